"""End a command whose cluster has lost its head: Ray would end the process with exit code 1, which says that concepts
failed, and without a word of the cause."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from pipeline.exit_codes import STOPPED

_RAYS_SETTING = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Variable by which clusters whose head may come back let Ray wait longer for it."""
_RAYS_DEFAULT_S = 60.0
_SHARE = 5 / 6
"""Share of the time for which Ray waits, so that this watch is ahead of it."""
_LOOK_EVERY_S = 2.0


def watch_head() -> None:
    """End this process with STOPPED once the head of its cluster has not answered for almost as long as Ray waits.

    It is a thread that ends the process, because a call that waits for the head does not let the main thread go.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    bound_s = _SHARE * float(os.environ.get(_RAYS_SETTING, _RAYS_DEFAULT_S))

    def is_there() -> bool:
        return not ray.is_initialized() or ray.get_runtime_context().gcs_address != address or _answers(address)

    def watch() -> None:
        if await_loss(is_there, ray.is_initialized, bound_s):
            sys.stderr.write(
                f"error: the head of the Ray cluster at {address} has not answered for {bound_s:.0f} s: its GCS was "
                "killed, ran out of memory or crashed, or its node is gone; run the same command again to continue\n"
            )
            sys.stderr.flush()
            os._exit(STOPPED)

    threading.Thread(target=watch, name="head-watch", daemon=True).start()


def await_loss(
    is_there: Callable[[], bool],
    is_needed: Callable[[], bool],
    bound_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Return True once `is_there` has been false for `bound_s`, or False as soon as `is_needed` is."""
    seen = clock()
    while is_needed():
        if is_there():
            seen = clock()
        elif clock() - seen >= bound_s:
            return True
        sleep(_LOOK_EVERY_S)
    return False


def _answers(address: str) -> bool:
    """Return whether something listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True
