"""Bound the wait for actors: a cluster that cannot bring one never says so."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

from pipeline.store.errors import ClusterLost, describe_error

log = logging.getLogger(__name__)

NO_NODE_S = 120.0
"""Longest time without a living node. A head is a node, too, so that without any there is no autoscaler either."""

_LOOK_EVERY_S = 5.0
"""Shortest time between two questions for the cluster's nodes."""

Resources = Mapping[str, float]
"""Amounts by Ray's names of resources, "CPU" and "GPU" among them."""

Nodes = Callable[[], Sequence[Mapping[str, Any]]]
"""Returns what `ray.nodes` does."""


def living_nodes() -> list[Resources]:
    """Return what each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class ActorWait:
    """The time since when no actor is ready, and what the cluster could do about it."""

    def __init__(
        self,
        needs: Mapping[str, float],
        start_s: float,
        *,
        nodes: Nodes = ray.nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to wait.

        needs: what Ray reserves for an actor, such as {"CPU": 1, "GPU": 1}. start_s: longest wait; 0 for no bound.
        """
        self._needs = needs
        self._start_s = start_s
        self._nodes = nodes
        self._clock = clock
        self._since = self._node_seen = clock()
        self._next_look = self._since + _LOOK_EVERY_S
        self._has_warned = False

    def check(self, num_ready: int) -> None:
        """Take note of the number of ready actors. Raises ClusterLost if none is ready and no node has been alive for
        `NO_NODE_S`, or none was ready for `start_s`."""
        now = self._clock()
        if num_ready:
            self._since = self._node_seen = now
            self._has_warned = False
            return
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_S
        alive = [node for node in self._nodes() if node["Alive"]]
        if alive:
            self._node_seen = now
        elif now - self._node_seen >= NO_NODE_S:
            raise ClusterLost(
                f"no node of the Ray cluster was alive for {now - self._node_seen:.0f} s: its raylet was killed, ran "
                "out of memory or crashed (its log in Ray's session folder says which)"
            )
        waited_s = now - self._since
        if self._start_s and waited_s >= self._start_s:
            raise ClusterLost(f"no actor was ready within {waited_s:.0f} s (actors.start_s): {self._reason(alive)}")
        if waited_s >= NO_NODE_S and not self._has_warned:
            self._has_warned = True
            log.warning("no actor is ready after %.0f s: %s", waited_s, self._reason(alive))

    def _reason(self, alive: Sequence[Mapping[str, Any]]) -> str:
        """Return why no actor starts, as far as the resources of the living nodes say."""
        needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items() if amount)
        if not alive:
            return "no node of the cluster is alive"
        held = [node["Resources"] for node in alive]
        if any(all(of.get(name, 0) >= amount for name, amount in self._needs.items()) for of in held):
            return f"an actor needs {needs}; nodes that have as much are busy with other work, or slow to load models"
        most = ", ".join(f"{max((of.get(name, 0) for of in held), default=0):g} {name}" for name in self._needs)
        return f"an actor needs {needs}, and no living node has as much (at most {most}); add one, or ask for less"


@contextmanager
def ending_without_actors(wait: ActorWait, num_ready: Callable[[], int]) -> Iterator[None]:
    """Raise the ClusterLost of `wait` in the block, in the middle of whatever the main thread does.

    Works in the main thread alone; elsewhere the block has no bound.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lost: list[ClusterLost] = []
    is_over = threading.Event()
    ending = threading.Lock()  # held while the signal is sent, which would end the process after the block

    def ring(_signal: int, _frame: FrameType | None) -> None:
        if lost and not is_over.is_set():
            raise lost[0]

    def watch() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            try:
                wait.check(num_ready())
            except ClusterLost as error:
                with ending:
                    if not is_over.is_set():
                        lost.append(error)
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return
            except Exception as error:
                log.warning("cannot ask the cluster for its nodes: %s", describe_error(error))

    before = signal.signal(signal.SIGUSR1, ring)
    watcher = threading.Thread(target=watch, name="actor-wait", daemon=True)
    try:  # in two parts, as the error may be raised in any line of the first, its `finally` included
        try:
            watcher.start()
            yield
        finally:
            with ending:
                is_over.set()
    finally:
        signal.signal(signal.SIGUSR1, before)


def num_alive(class_name: str) -> int:
    """Return how many actors of this job are alive whose class has this name, or is one of Ray Data's around it.

    Ray has no public function for it that does without its dashboard.
    """
    job = ray._private.worker.global_worker.current_job_id
    table = ray._private.state.actors(job_id=job, actor_state_name="ALIVE")
    names = [str(actor.get("ActorClassName", "")) for actor in table.values()]
    return sum(class_name in name or "MapWorker" in name for name in names)
