"""The actors of a run: they live from the first stage that needs them to its end, and load the model once each.

A stage says in which ways the actors can get ready for it, each actor in one of them at a time, and how many it wants.
Here they are started, replaced and dismissed; what becomes of the calls that a lost actor had is for the stage to
decide.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.actor.interface import LearnerHandle
from pipeline.store.errors import RunAborted, describe_error
from pipeline.store.retries import backoff_s
from pipeline.verdict import Policy
from pipeline.worker import Prepare, Worker

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 60.0
"""Longest wait after failed starts, or after failures of storage."""

_GATHER_S, _LONGEST_GATHER_S = 1e-4, 0.25
"""Pause between the first event and the look for others: for each reference, and at most. A look takes about 1 µs of
CPU for each of the references, thousands where there are hundreds of actors, and should find many events."""

NewActor = Callable[[], LearnerHandle]


@dataclass(frozen=True, slots=True)
class Event:
    """The end of a call to an actor: what it returned, or the error."""

    ref: Any
    worker: Worker
    value: Any
    error: Exception | None


class Fleet:
    """Actors that start, work and are replaced."""

    def __init__(self, new_actor: NewActor, policy: Policy, *, keeps_idle: bool = False) -> None:
        """Begin without an actor. `new_actor` starts one (`interface.LearnerActor`).

        keeps_idle: keep actors for which a stage has no more work, as a later one may have some.
        """
        self.policy = policy
        self.workers: list[Worker] = []
        self._new_actor = new_actor
        self._keeps_idle = keeps_idle
        self._ways: tuple[Prepare, ...] = ()
        self._start_failures = 0
        self._next_start = 0.0
        self._seconds_before = 0.0
        """Seconds for which actors lived that are gone."""

    def use(self, *ways: Prepare) -> None:
        """Let every actor that lives get ready in the first of these ways. To be called when none works."""
        self._ways = ways
        for worker in self.staying():
            self.change(worker, 0)

    def change(self, worker: Worker, rung: int) -> None:
        """Let an actor that has no calls get ready in the way of this number."""
        worker.prepare(self._ways[rung], rung)

    def max_actors(self) -> int:
        """Return how many actors there may be."""
        return max(self.policy.max_actors, self.policy.actor_capacity() if self.policy.actor_capacity else 0)

    def ready(self) -> list[Worker]:
        """Return the actors that have loaded the model and are prepared."""
        return [worker for worker in self.workers if worker.starting is None]

    def staying(self) -> list[Worker]:
        """Return the actors whose nodes have no notice."""
        return [worker for worker in self.workers if not worker.is_leaving]

    def actor_seconds(self) -> float:
        """Return the seconds for which actors have lived, summed over those that live and those that are gone."""
        return self._seconds_before + sum(time.monotonic() - worker.began for worker in self.workers)

    def resize(self, wanted: int, rungs: Iterable[int] = ()) -> None:
        """Start actors one by one until as many stay as wanted, and let idle ones go where there are more.

        `rungs` are the ways in which those that are started get ready, one after the other, and then the first one.
        Actors that have not come up yet, and may never find a node, are let go first, and those that get ready for work
        last. None are where idle ones are kept.
        """
        ways = iter(rungs)
        staying = self.staying()
        idle = [] if self._keeps_idle else [worker for worker in staying if not worker.calls]
        idle.sort(key=lambda worker: (worker.is_loaded, worker.starting is not None))
        for worker in idle[: max(0, len(staying) - wanted)]:
            self.remove(worker)
        for _ in range(wanted - len(staying)):
            if time.monotonic() < self._next_start:
                return
            if self._start_failures >= self.policy.max_start_failures and self.workers:
                return  # the actors that do live carry on alone
            rung = next(ways, 0)
            self.workers.append(Worker.start(self._new_actor(), self._ways[rung], rung))
            if self._start_failures:
                return  # after a failure, one at a time

    def wait(self, calls: Mapping[Any, Worker], timeout_s: float) -> list[Event]:
        """Wait until one of the calls ends, an actor is ready or its node has notice; return all that has happened by
        a moment later, errors last: an actor that died may have finished other calls first."""
        refs = dict(calls)
        refs |= {ref: worker for worker in self.workers for ref in (worker.starting, worker.notice) if ref is not None}
        if not refs:
            time.sleep(min(timeout_s, max(0.0, self._next_start - time.monotonic())))
            return []
        some, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        if not some:
            return []
        time.sleep(min(timeout_s, _LONGEST_GATHER_S, len(refs) * _GATHER_S))
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        return sorted((_event(ref, refs[ref]) for ref in ended), key=lambda event: event.error is not None)

    def take_note(self, event: Event) -> Exception | None:
        """Take note of an actor's start or notice; return the error if it is one by which a ready actor was lost.

        Raises RunAborted if too many actors in a row did not start and none is left.
        """
        if event.ref is event.worker.starting:
            self._on_started(event)
        elif event.ref is event.worker.notice:
            return self._on_notice(event)
        return None

    def mark_leaving(self, worker: Worker) -> None:
        """Take note that the actor's node is taken back, so that another is started in its place."""
        if not worker.is_leaving:
            log.warning("the node of an actor with %d concepts is taken back: it gets no more", len(worker.calls))
        worker.is_leaving = True

    def remove(self, worker: Worker) -> None:
        """End an actor."""
        worker.starting = worker.notice = None  # nobody asks any more what became of them
        self.workers.remove(worker)
        self._seconds_before += time.monotonic() - worker.began
        ray.kill(worker.handle)

    def dismiss(self, *, only_busy: bool = False) -> None:
        """End all actors, or those with calls for which nobody waits any more."""
        for worker in list(self.workers):
            if worker.calls or not only_busy:
                self.remove(worker)

    def _on_started(self, event: Event) -> None:
        if event.error is None:
            event.worker.mark_ready(event.value)
            self._start_failures = 0
            return
        self.remove(event.worker)
        self._start_failures += 1
        self._next_start = time.monotonic() + backoff_s(self._start_failures, self.policy.backoff_s, LONGEST_PAUSE_S)
        log.warning("an actor did not start (%d in a row): %s", self._start_failures, describe_error(event.error))
        if self._start_failures >= self.policy.max_start_failures and not self.workers:
            raise RunAborted(
                f"{self._start_failures} actors in a row did not start: {describe_error(event.error)}"
            ) from event.error

    def _on_notice(self, event: Event) -> Exception | None:
        event.worker.notice = None
        if event.error is None:
            self.mark_leaving(event.worker)
        elif isinstance(event.error, RayTaskError):
            log.warning("an actor does not say when its node is taken back: %s", describe_error(event.error))
        else:
            return event.error
        return None


def _event(ref: Any, worker: Worker) -> Event:
    try:
        return Event(ref, worker, ray.get(ref), None)
    except RayError as error:
        return Event(ref, worker, None, error)
