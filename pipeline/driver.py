"""THE scheduling loop: bounded calls in flight, dead actors replaced, every task settled exactly once.

Owns no numerics and no paths. Actors are never restarted by Ray: with `max_restarts=0` the error names the true cause,
and the driver decides what happens to the concepts that were on the actor.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Event
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.actor.publish import failure_record
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.progress import Progress
from pipeline.store.errors import ActorBroken, ActorLeaving, RunAborted, StoreFailed, describe_error
from pipeline.store.retries import backoff_s
from pipeline.verdict import Policy, bug_text, kind_of_loss
from textual_inversion.errors import BUG

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Work:
    task: ConceptTask
    attempts: int = 0
    """Calls lost so far."""
    alone: int = 0
    """Of these, those with nothing else on the actor."""
    began: float = math.inf
    """When its turn came; monotonic seconds."""


@dataclass(eq=False, slots=True)
class _Actor:
    handle: Any
    starting: Any
    """Reference that resolves when the actor is ready; None from then on."""
    capacity: int = 1
    """Calls it takes at a time; known when it is ready."""
    calls: dict[Any, _Work] = field(default_factory=dict)
    notice: Any = None
    """Reference that resolves when its node is to be taken back; None before it is ready, and from then on."""
    is_leaving: bool = False
    """It has notice: it goes on with what it has begun, and gets nothing more."""
    alone: bool = False
    """It runs a suspect and gets nothing else until that call ends."""


def drive(
    tasks: Iterable[ConceptTask],
    new_actor: Callable[[], Any],
    policy: Policy,
    progress: Progress | None = None,
    stop: Event | None = None,
    *,
    until: float = math.inf,
) -> Iterator[ConceptRecord]:
    """Run every task on actors and yield its record, done or failed; raises RunAborted when actors cannot live.

    `tasks` is pulled lazily, a little ahead of the actors. `new_actor()` returns the handle of a Ray actor with
    `max_restarts=0` and the methods `ready()`, which says how many calls it takes at a time, `learn(task, attempt)`,
    which returns a ConceptRecord, `drain(seconds)`, and `notice()`, which returns when its node is to be taken back.
    From then on its `learn` raises ActorLeaving for all that it has not begun; another actor is started at once. When
    `stop` is set, nothing new is handed out, running concepts get `drain_s` to write checkpoints, and the iterator
    ends. From `until` on, in seconds since 1970, nothing new is handed out either, and the iterator ends when those are
    finished whose turn had come by then.
    """
    fleet = _Fleet(iter(tasks), new_actor, policy, until)
    stop = stop or Event()
    try:
        while fleet.has_work() and not stop.is_set():
            fleet.match_demand()
            fleet.hand_out()
            yield from fleet.collect(timeout_s=1.0)
            yield from fleet.replace_stalled()
            if progress is not None:
                progress.update(done=fleet.done, failed=fleet.failed, running=fleet.describe(), counts=fleet.counts())
        if stop.is_set():
            yield from fleet.drain()
        if progress is not None:
            progress.update(done=fleet.done, failed=fleet.failed, counts=fleet.counts(), final=True)
    finally:
        fleet.dismiss()


class _Fleet:
    """The actors, what each is doing, and what waits."""

    def __init__(
        self, tasks: Iterator[ConceptTask], new_actor: Callable[[], Any], policy: Policy, until: float
    ) -> None:
        self._tasks, self._until = tasks, until
        self._new_actor = new_actor
        self._policy = policy
        self._actors: list[_Actor] = []
        self._ahead: deque[_Work] = deque()
        self._suspects: deque[_Work] = deque()
        """Were on an actor when it died; each runs alone, so that one which kills actors takes no other with it."""
        self._start_failures = 0
        self._fruitless_deaths = 0
        self._next_start = 0.0
        self._store_failures = 0
        self._next_call = 0.0
        self.done = 0
        self.failed = 0
        self.retried = 0
        """Calls lost with an actor, its node or storage, and made again."""
        self.quarantined = 0
        """Of the failed, those given up after `max_attempts` lost calls."""

    def has_work(self) -> bool:
        if self._is_late():
            return any(math.isfinite(work.began) for actor in self._actors for work in actor.calls.values())
        self._look_ahead()
        return bool(self._ahead or self._suspects or self._in_flight())

    def counts(self) -> dict[str, int]:
        ready = len(self._ready())
        return {
            "retried": self.retried,
            "quarantined": self.quarantined,
            "in_flight": self._in_flight(),
            "ready": ready,
            "starting": len(self._actors) - ready,
        }

    def describe(self) -> str:
        ready = len(self._ready())
        starting = len(self._actors) - ready
        return f"{self._in_flight()} on {ready} actors" + (f" ({starting} starting)" if starting else "")

    def match_demand(self) -> None:
        """As many actors as there is work for: more are started one by one, idle ones are let go at the tail; first
        those that have not come up yet, which may never find a node."""
        waiting = 0 if self._is_late() else len(self._ahead) + len(self._suspects)
        wanted = min(self._most(), waiting + self._in_flight())
        staying = self._staying()
        idle = sorted((actor for actor in staying if not actor.calls), key=lambda actor: actor.starting is None)
        left = [actor for actor in self._actors if actor.is_leaving and not actor.calls]
        for actor in left + idle[: max(0, len(staying) - wanted)]:
            self._remove(actor)
        while len(self._staying()) < wanted and time.monotonic() >= self._next_start:
            if self._start_failures >= self._policy.max_start_failures and self._actors:
                return  # the actors that do live carry on alone
            handle = self._new_actor()
            self._actors.append(_Actor(handle, starting=handle.ready.remote()))
            if self._start_failures:
                return  # after a failure, one at a time

    def hand_out(self) -> None:
        """Fill the ready actors: a suspect to an empty one, else shares of what lies ahead, least busy actor first."""
        if self._is_late() or time.monotonic() < self._next_call:
            return
        staying = self._staying()
        ready = [actor for actor in staying if actor.starting is None]
        for actor in sorted(ready, key=lambda actor: len(actor.calls)):
            if self._suspects and not actor.calls:
                actor.alone = True
                self._call(actor, self._suspects.popleft())
            known = len(self._ahead) + self._in_flight()
            share = min(actor.capacity, math.ceil(known / len(staying)))
            while self._ahead and not actor.alone and len(actor.calls) < share:
                self._call(actor, self._ahead.popleft())
                self._look_ahead()

    def collect(self, timeout_s: float) -> Iterator[ConceptRecord]:
        """Wait for something to happen and deal with all that has."""
        refs = {ref: actor for actor in self._actors for ref in actor.calls}
        refs |= {ref: actor for actor in self._actors for ref in (actor.starting, actor.notice) if ref is not None}
        if not refs:
            time.sleep(min(timeout_s, max(0.0, max(self._next_start, self._next_call) - time.monotonic())))
            return
        some, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        if not some:
            return
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        results = [(ref, refs[ref], _get(ref)) for ref in ready]
        # An actor that died may have finished other concepts first: take those before its calls become suspects.
        for ref, actor, (value, error) in sorted(results, key=lambda result: result[2][1] is not None):
            if ref is actor.starting:
                self._started(actor, value, error)
            elif ref is actor.notice:
                yield from self._noticed(actor, error)
            elif ref in actor.calls:
                yield from self._answered(actor, ref, value, error)

    def replace_stalled(self) -> Iterator[ConceptRecord]:
        """A hung device or download raises nothing; only time shows it. The concept is to blame, not its neighbours."""
        limit_s = self._policy.stall_s or math.inf
        for actor in self._ready():
            hung = [work for work in actor.calls.values() if time.monotonic() - work.began > limit_s]
            if hung:
                error = TimeoutError(f"not learned within {limit_s:.0f} s (actors.stall_s)")
                yield from self._bury(actor, error, hung)

    def drain(self) -> Iterator[ConceptRecord]:
        """Give running concepts time to write a checkpoint, then take what finished meanwhile."""
        busy = [actor for actor in self._ready() if actor.calls]
        if not busy:
            return
        log.warning("stopping: waiting up to %.0f s for %d concepts to save", self._policy.drain_s, self._in_flight())
        refs = [actor.handle.drain.remote(self._policy.drain_s) for actor in busy]
        ray.wait(refs, num_returns=len(refs), timeout=self._policy.drain_s + 5, fetch_local=False)
        yield from self.collect(timeout_s=0)

    def dismiss(self) -> None:
        for actor in list(self._actors):
            self._remove(actor)

    def _look_ahead(self) -> None:
        """Pull tasks until every actor there could be would find its fill."""
        enough = self._most() * max((actor.capacity for actor in self._actors), default=1)
        while len(self._ahead) < enough:
            task = next(self._tasks, None)
            if task is None:
                return
            self._ahead.append(_Work(task))

    def _most(self) -> int:
        return max(self._policy.max_actors, self._policy.room() if self._policy.room else 0)

    def _is_late(self) -> bool:
        return time.time() >= self._until

    def _ready(self) -> list[_Actor]:
        return [actor for actor in self._actors if actor.starting is None]

    def _staying(self) -> list[_Actor]:
        return [actor for actor in self._actors if not actor.is_leaving]

    def _in_flight(self) -> int:
        return sum(len(actor.calls) for actor in self._actors)

    def _call(self, actor: _Actor, work: _Work) -> None:
        actor.calls[actor.handle.learn.remote(work.task, work.attempts + 1)] = work
        work.began = math.inf
        self._take_turns(actor)

    def _take_turns(self, actor: _Actor) -> None:
        """The calls it has had longest are those it works on."""
        if self._is_late():
            return
        for work in islice(actor.calls.values(), max(1, actor.capacity - self._policy.calls_ahead)):
            work.began = min(work.began, time.monotonic())

    def _started(self, actor: _Actor, capacity: int, error: Exception | None) -> None:
        actor.starting = None
        if error is None:
            actor.capacity, actor.notice = capacity, actor.handle.notice.remote()
            self._start_failures = 0
            return
        self._remove(actor)
        self._start_failures += 1
        self._next_start = time.monotonic() + backoff_s(self._start_failures, self._policy.backoff_s, 60.0)
        log.warning("an actor did not start (%d in a row): %s", self._start_failures, describe_error(error))
        if self._start_failures >= self._policy.max_start_failures and not self._actors:
            raise RunAborted(
                f"{self._start_failures} actors in a row did not start: {describe_error(error)}"
            ) from error

    def _noticed(self, actor: _Actor, error: Exception | None) -> Iterator[ConceptRecord]:
        actor.notice = None
        if error is None:
            self._leaves(actor)
        elif isinstance(error, RayTaskError):
            log.warning("an actor does not say when its node is taken back: %s", describe_error(error))
        else:
            yield from self._bury(actor, error)

    def _leaves(self, actor: _Actor) -> None:
        if not actor.is_leaving:
            log.warning("the node of an actor with %d concepts is taken back: it gets no more", len(actor.calls))
        actor.is_leaving = True

    def _answered(self, actor: _Actor, ref: Any, record: Any, error: Exception | None) -> Iterator[ConceptRecord]:
        work = actor.calls.pop(ref)
        was_alone, actor.alone = actor.alone, False
        self._take_turns(actor)
        cause = error.cause if isinstance(error, RayTaskError) else error
        if error is None:
            self._fruitless_deaths = self._store_failures = 0
            yield self._settle(record)
        elif not isinstance(error, RayTaskError) or isinstance(cause, ActorBroken):
            actor.calls[ref], actor.alone = work, was_alone
            yield from self._bury(actor, error)
        elif isinstance(cause, ActorLeaving):
            self._leaves(actor)
            (self._suspects if was_alone else self._ahead).appendleft(work)
        elif isinstance(cause, StoreFailed):
            self._store_failed(work, error)
        elif isinstance(cause, OSError):  # its photos' store or network
            yield from self._lost(work, self._ahead, error)
        else:
            self._fruitless_deaths = 0
            yield self._settle(failure_record(work.task, bug_text(error), work.attempts + 1, BUG))

    def _store_failed(self, work: _Work, error: Exception) -> None:
        """The run's storage failed, in spite of all tries: this concept first when a while has passed. All that fail
        before that count as one."""
        self.retried += 1
        self._ahead.appendleft(work)
        if time.monotonic() < self._next_call:
            return
        self._store_failures += 1
        if self._store_failures >= self._policy.max_store_failures:
            raise RunAborted(
                f"storage failed {self._store_failures} times in a row: {describe_error(error)}"
            ) from error
        pause_s = backoff_s(self._store_failures, self._policy.backoff_s, 60.0)
        self._next_call = time.monotonic() + pause_s
        log.warning("nothing new for %.0f s, as storage fails: %s", pause_s, describe_error(error))

    def _bury(self, actor: _Actor, error: Exception, to_blame: Sequence[_Work] = ()) -> Iterator[ConceptRecord]:
        """The actor is lost: its concepts, or those `to_blame`, become suspects; none if its node was taken back, which
        proves nothing. Ray knows of that only when the notice had run out."""
        preempted = actor.is_leaving or bool(getattr(error, "preempted", False))
        log.warning("an actor with %d concepts was lost: %s", len(actor.calls), describe_error(error))
        self._remove(actor)
        lost, actor.calls = list(actor.calls.values()), {}
        unproven = self._suspects if actor.alone else self._ahead
        is_known = any(work.alone for work in lost)
        for work in lost:
            if preempted or (to_blame and work not in to_blame):
                self.retried += 1
                unproven.appendleft(work)
            else:
                work.alone += len(lost) == 1
                yield from self._lost(work, self._suspects, error)
        self._fruitless_deaths += not (preempted or is_known)
        if self._fruitless_deaths >= self._policy.max_fruitless_deaths:
            raise RunAborted(f"{self._fruitless_deaths} actors in a row died: {describe_error(error)}") from error

    def _lost(self, work: _Work, queue: deque[_Work], error: Exception) -> Iterator[ConceptRecord]:
        work.attempts += 1
        if work.attempts < self._policy.max_attempts:
            self.retried += 1
            if work.alone:
                queue.appendleft(work)  # until it is known what to think of it
            else:
                queue.append(work)
        else:
            self.quarantined += 1
            alone = f", {work.alone} of them alone" if work.alone else ""
            cause = f"given up after {work.attempts} lost calls{alone}; the last: {describe_error(error)}"
            record = failure_record(work.task, cause, work.attempts, kind_of_loss(error))
            yield self._settle(dataclasses.replace(record, quarantined=True))

    def _settle(self, record: ConceptRecord) -> ConceptRecord:
        is_done = record.status == "done"
        self.done += is_done
        self.failed += not is_done
        return record

    def _remove(self, actor: _Actor) -> None:
        actor.notice = None
        self._actors.remove(actor)
        ray.kill(actor.handle)


def _get(ref: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(ref), None
    except RayError as error:
        return None, error
