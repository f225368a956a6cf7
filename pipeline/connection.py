"""The connection of a command to a Ray cluster: one that it finds itself in, or one that it starts on this machine."""

from __future__ import annotations

import logging
import os

from pipeline.config import RunConfig
from pipeline.head_watch import watch_head
from pipeline.report.logs import announce, hide_token_notice
from pipeline.store.errors import ClusterLost, describe_error

# ray is imported where it is first needed, so that --help and --dry-run answer at once.


def connect(config: RunConfig, *, dashboard: bool = False) -> tuple[float, float]:
    """Join the cluster of this process, or start one on this machine; return its GPUs, 0 if none are to be used, and
    its cores. Raises ValueError for an output that other processes cannot see, and ClusterLost if Ray does not start.

    dashboard: start Ray's dashboard with a cluster of this machine; Ray Train asks it whether its processes live.
    """
    if config.output.startswith("memory:"):
        raise ValueError(f"output {config.output!r}: memory:// is seen by one process only; give a folder or a bucket")
    if config.log_format == "json":
        os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")  # a prefix would break JSON lines
    import ray

    if not ray.is_initialized():
        # Ray finds RAY_ADDRESS (set by `ray job submit`) or a cluster of this machine without an address. Ray refuses
        # arguments that shape a new cluster when it joins one.
        local = {"include_dashboard": dashboard} if os.environ.get("RAY_ADDRESS", "local") == "local" else {}
        announce(config.log_format, "starting Ray on this machine" if local else "joining the Ray cluster")
        hide_token_notice()
        try:
            ray.init(logging_level=logging.WARNING, **local)
        except ValueError:  # an address that is none
            raise
        except Exception as error:  # Ray raises no class of its own
            raise ClusterLost(f"Ray did not start, or cannot be reached: {describe_error(error)}") from error
        watch_head()
    resources = ray.cluster_resources()
    gpus = 0.0 if config.device == "cpu" else float(resources.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        gpus = config.actors.gpus or 1.0  # asked for: an autoscaler may bring one
    return gpus, float(resources.get("CPU", 1))
