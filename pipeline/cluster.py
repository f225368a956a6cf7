"""What the cluster has room for, and what starts an actor on it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray

from pipeline.actor.learner import Learner
from pipeline.config import RunConfig
from pipeline.prometheus import export
from pipeline.report.logs import configure_logs
from pipeline.store.errors import describe_error
from pipeline.verdict import Policy

log = logging.getLogger(__name__)

_LOOK_EVERY_S, _NOTICE_EVERY_S = 10.0, 5.0


def learner_actors(config: RunConfig, gpus: float) -> Callable[[], Any]:
    """What starts an actor: on a GPU if the cluster has any (`gpus`), else on CPU cores, with no other difference."""
    on_device = dataclasses.replace(config, device="cuda" if gpus else "cpu")
    actor_class = ray.remote(
        max_restarts=0,
        max_task_retries=0,
        num_cpus=config.actors.cpus,
        num_gpus=config.actors.gpus if gpus else 0,
    )(Learner)
    return lambda: actor_class.remote(on_device, partial(_equip, config))


def policy_of(config: RunConfig, gpus: float, cpus: float) -> Policy:
    """As configured; the number of actors, if left open, is what the cluster's GPUs or cores hold, now and later."""
    return Policy(
        max_actors=config.actors.count or actors_in(config, gpus, cpus),
        room=None if config.actors.count else Room(config, on_gpus=gpus > 0),
        max_attempts=config.actors.max_attempts,
        drain_s=config.actors.drain_s,
        stall_s=config.actors.stall_s,
        calls_ahead=config.actors.calls_ahead,
    )


def actors_in(config: RunConfig, gpus: float, cpus: float) -> int:
    """How many actors a cluster of so many GPUs and cores holds; at least one."""
    room = gpus / config.actors.gpus if gpus and config.actors.gpus else cpus / config.actors.cpus
    return max(1, int(room))


class Room:
    """`actors_in` of the cluster as it is: nodes that join a run take part in it."""

    def __init__(self, config: RunConfig, *, on_gpus: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._on_gpus, self._clock = config, on_gpus, clock
        self._seen, self._next_look = 1, clock() + _LOOK_EVERY_S

    def __call__(self) -> int:
        """Asks the cluster every ten seconds at most."""
        if self._clock() >= self._next_look:
            self._next_look = self._clock() + _LOOK_EVERY_S
            there = ray.cluster_resources()
            gpus = there.get("GPU", 0) if self._on_gpus else 0
            self._seen = actors_in(self._config, gpus, there.get("CPU", 1))
        return self._seen


def is_leaving() -> bool:
    """Whether the node of this process has notice that it will be taken back. Ray has no public word for it; should the
    one that its own libraries use be gone, nodes seem to go without notice."""
    try:
        draining = ray._private.state.state.get_draining_nodes()
    except Exception as error:
        log.warning("no notice of nodes that are taken back: %s", describe_error(error))
        return False
    return ray.get_runtime_context().get_node_id() in draining


def watch_for_notice(leave: Callable[[], None], is_leaving: Callable[[], bool] = is_leaving) -> None:
    """From now on: while this node has notice, call `leave` every few seconds. What is saved each time is all but
    seconds of what the node would take with it, not only what the last checkpoint had."""

    def watch() -> None:
        rest = threading.Event()
        while not rest.wait(_NOTICE_EVERY_S):
            if is_leaving():
                leave()

    threading.Thread(target=watch, name="notice", daemon=True).start()


def _equip(config: RunConfig, learner: Learner) -> None:
    """An actor's process: its log lines as the run's, its metrics, and what it does when its node is taken back."""
    configure_logs(config.log_format, logging.WARNING)
    export(learner.vitals)
    watch_for_notice(learner.leave)
