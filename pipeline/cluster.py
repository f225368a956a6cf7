"""The actors of a run on a Ray cluster: what starts one, how many it holds, and notice that a node is taken back."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import ray

from pipeline.actor.interface import LearnerActor, LearnerHandle
from pipeline.actor_wait import Resources, living_nodes
from pipeline.config import RunConfig
from pipeline.fleet import Fleet
from pipeline.model_actor import ModelActor
from pipeline.prometheus import export
from pipeline.report.logs import configure_logs
from pipeline.store.errors import describe_error
from pipeline.verdict import Policy

log = logging.getLogger(__name__)

_COUNT_EVERY_S = 10.0
"""Shortest time between two questions for the cluster's resources."""

_NOTICE_EVERY_S = 5.0
"""Time between two questions for notice of this node."""


def new_fleet(config: RunConfig, gpus: float) -> Fleet:
    """Return the run's fleet, in which no actor has started. Idle actors are kept if pictures are to be drawn."""
    nodes = living_nodes()
    policy = policy_from_config(config, gpus, nodes)
    return Fleet(learner_actors(config, gpus, nodes), policy, keeps_idle=bool(config.generation.prompts))


def learner_actors(config: RunConfig, gpus: float, nodes: Sequence[Resources]) -> Callable[[], LearnerHandle]:
    """Return a function that starts an actor.

    Actors are on GPUs if the cluster has any (`gpus`), else on CPU cores, with no other difference. `nodes` are those
    that live now.
    """
    on_device = dataclasses.replace(config, device="cuda" if gpus else "cpu")
    model_actor: type[LearnerActor] = ModelActor  # what the driver calls is what there is
    actor_class = ray.remote(
        max_restarts=0,
        max_task_retries=0,
        num_cpus=cpus_to_reserve(config, nodes, on_gpus=gpus > 0),
        num_gpus=config.actors.gpus if gpus else 0,
    )(model_actor)
    return lambda: actor_class.remote(on_device, partial(_set_up_process, config))


def policy_from_config(config: RunConfig, gpus: float, nodes: Sequence[Resources]) -> Policy:
    """Return the configured policy; the number of actors, if left open, is what the nodes hold, now and later."""
    return Policy(
        max_actors=config.actors.count or actors_in(config, nodes, on_gpus=gpus > 0),
        actor_capacity=None if config.actors.count else ActorCapacity(config, on_gpus=gpus > 0),
        max_attempts=config.actors.max_attempts,
        drain_s=config.actors.drain_s,
        stall_s=config.actors.stall_s,
        calls_ahead=config.actors.calls_ahead,
        start_s=config.actors.start_s,
        needs={"CPU": config.actors.cpus, "GPU": config.actors.gpus if gpus else 0},
    )


def actors_in(config: RunConfig, nodes: Sequence[Resources], *, on_gpus: bool) -> int:
    """Return how many actors the nodes hold; at least one.

    An actor needs its cores and its GPUs on one node, and a fraction of a GPU on one GPU: what is left of several adds
    up to no room.
    """
    return max(1, sum(_room(config, node, on_gpus) for node in nodes))


def cpus_to_reserve(config: RunConfig, nodes: Sequence[Resources], *, on_gpus: bool) -> float:
    """Return the cores that Ray reserves for each actor.

    They are those of the settings or, where pictures are drawn in bulk, so few that every node keeps a whole one free:
    Ray Data's reading, splitting and writing are tasks that need a core each, and would never start beside the actors.
    """
    if not config.generation.prompts:
        return config.actors.cpus
    shares = [(node["CPU"] - 1) / room for node in nodes if (room := _room(config, node, on_gpus))]
    return math.floor(1000 * max(0.0, min([config.actors.cpus, *shares]))) / 1000


def _room(config: RunConfig, node: Resources, on_gpus: bool) -> int:
    room = int(node.get("CPU", 0) / config.actors.cpus)
    if not (on_gpus and config.actors.gpus):
        return room
    gpus, share = node.get("GPU", 0), config.actors.gpus
    return min(room, int(gpus / share) if share >= 1 else int(gpus) * int(1 / share))


class ActorCapacity:
    """Counter of the actors that the cluster holds now, so that nodes which join a run take part in it."""

    def __init__(self, config: RunConfig, *, on_gpus: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._on_gpus = on_gpus
        self._clock = clock
        self._num_actors = 1
        self._next_count = clock() + _COUNT_EVERY_S

    def __call__(self) -> int:
        """Return the number; the cluster is asked every ten seconds at most."""
        if self._clock() >= self._next_count:
            self._next_count = self._clock() + _COUNT_EVERY_S
            self._num_actors = actors_in(self._config, living_nodes(), on_gpus=self._on_gpus)
        return self._num_actors


def is_leaving() -> bool:
    """Return whether the node of this process has notice that it will be taken back.

    Ray has no public function for it. Where the one that its own libraries use is gone, nodes seem to go without
    notice.
    """
    try:
        draining = ray._private.state.state.get_draining_nodes()
    except Exception as error:
        log.warning("no notice of nodes that are taken back: %s", describe_error(error))
        return False
    return ray.get_runtime_context().get_node_id() in draining


def watch_for_notice(leave: Callable[[], None], is_leaving: Callable[[], bool] = is_leaving) -> None:
    """Start a thread that calls `leave` every few seconds while this node has notice.

    Each call saves all work but that of the last seconds, and not only what the last checkpoint had.
    """

    def watch() -> None:
        rest = threading.Event()
        while not rest.wait(_NOTICE_EVERY_S):
            if is_leaving():
                leave()

    threading.Thread(target=watch, name="notice", daemon=True).start()


def _set_up_process(config: RunConfig, actor: ModelActor) -> None:
    """Set up an actor's process: log lines like the run's, metrics, and the watch for notice."""
    configure_logs(config.log_format, logging.WARNING)
    export(actor.vitals)
    watch_for_notice(actor.leave)
