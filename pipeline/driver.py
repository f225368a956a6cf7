"""THE scheduling loop: bounded calls in flight, dead actors replaced, every task settled exactly once.

No numerics and no paths in here. Ray never restarts an actor (`max_restarts=0`): so each error names its true cause,
`verdict.decide` says what becomes of the concepts that were on the actor, and this module does it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import repeat
from threading import Event
from typing import Any

import ray

from pipeline.actor.interface import LearnerHandle
from pipeline.actor.publish import failure_record
from pipeline.actor_wait import ActorWait
from pipeline.config import RunConfig
from pipeline.fleet import LONGEST_PAUSE_S, Fleet
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.progress import Progress
from pipeline.store.errors import RunAborted, StorageLost, describe_error
from pipeline.store.retries import backoff_s
from pipeline.verdict import ActorFacts, Fate, Verdict, actor_fate, cause_of, decide, proves_nothing
from pipeline.work_queue import Work, WorkQueue
from pipeline.worker import Worker
from textual_inversion.errors import BAD_INPUT, BadInput

log = logging.getLogger(__name__)

Replan = Callable[[ConceptTask], ConceptTask]
"""Returns a concept's task from its photos as they are now. Raises BadInput if there is none."""

Ended = tuple[ConceptTask, ConceptRecord]
"""A task and its record."""


def drive(
    queue: WorkQueue,
    fleet: Fleet,
    settings: Sequence[RunConfig],
    progress: Progress | None = None,
    stop: Event | None = None,
    *,
    until: float = math.inf,
    replan: Replan | None = None,
) -> Iterator[Ended]:
    """Run every task on actors and yield it with its record, done or failed. Raises RunAborted when the run cannot go
    on.

    The queue pulls tasks lazily, a little ahead of the actors. More may be added to it when one is yielded, with the
    same concept, say. `settings` are those of each rung (`ConceptTask.rung`): an actor has concepts of one rung at a
    time, and changes to another when none of its own are left. When an actor has notice that its node is taken back,
    another is started at once. `replan` makes the new task of a concept whose photos have changed since its task was
    made; without it, and on a rung above 0, such a concept fails. When `stop` is set, nothing new is handed out,
    running concepts get `drain_s` to write checkpoints, and the iterator ends. From `until` on, in seconds since 1970,
    nothing new is handed out either, and the iterator ends when those concepts are finished whose turn had come by
    then. The fleet's actors live on, but for those that have calls left then, or were stopped.
    """
    schedule = _Schedule(queue, fleet, until, replan)
    stop = stop or Event()
    fleet.use(*(partial(_prepare, config) for config in settings))
    try:
        while schedule.has_work() and not stop.is_set():
            schedule.hand_out()
            schedule.match_demand()
            schedule.check_wait()
            yield from schedule.collect(timeout_s=1.0)
            yield from schedule.replace_stalled()
            if progress is not None:
                running, counts = schedule.describe(), schedule.counts()
                progress.update(done=schedule.done, failed=schedule.failed, running=running, counts=counts)
        if stop.is_set():
            yield from schedule.drain()
        if progress is not None:
            progress.update(done=schedule.done, failed=schedule.failed, counts=schedule.counts(), final=True)
    finally:
        fleet.dismiss(only_busy=not stop.is_set())  # an actor that has been drained begins nothing more


def _prepare(config: RunConfig, handle: LearnerHandle) -> Any:
    return handle.prepare.remote(config)


class _Schedule:
    """The concepts on each actor, and those that wait."""

    def __init__(self, queue: WorkQueue, fleet: Fleet, until: float, replan: Replan | None) -> None:
        self._fleet = fleet
        self._policy = fleet.policy
        self._until = until
        self._replan = replan
        self._queue = queue
        self._wait = ActorWait(self._policy.needs, self._policy.start_s)
        self._fruitless_deaths = 0
        self._store_failures = 0
        self._next_call = 0.0
        self.done = 0
        self.failed = 0
        self.tried_again = 0
        """Tries on rungs above 0 that have ended."""
        self.retried = 0
        """Calls lost with an actor, its node or storage, and made again."""
        self.quarantined = 0
        """Failed concepts that were given up after `max_attempts` lost calls."""

    def has_work(self) -> bool:
        if self._is_late():
            return any(math.isfinite(work.began) for worker in self._fleet.workers for work in worker.calls.values())
        self._queue.look_ahead(self._enough_ahead())
        return bool(len(self._queue) or self._in_flight())

    def counts(self) -> dict[str, int]:
        loaded = self._num_loaded()
        waiting = sum(number for rung, number in self._queue.num_waiting().items() if rung)
        return {
            "tried_again": self.tried_again,
            "trying_again": waiting + sum(len(worker.calls) for worker in self._fleet.workers if worker.rung),
            "retried": self.retried,
            "quarantined": self.quarantined,
            "in_flight": self._in_flight(),
            "ready": loaded,
            "starting": len(self._fleet.workers) - loaded,
        }

    def describe(self) -> str:
        loaded = self._num_loaded()
        numbers = {
            "starting": len(self._fleet.workers) - loaded,
            "changing the settings": loaded - len(self._fleet.ready()),
        }
        others = ", ".join(f"{number} {words}" for words, number in numbers.items() if number)
        return f"{self._in_flight()} on {loaded} actors" + (f" ({others})" if others else "")

    def match_demand(self) -> None:
        """Let the fleet have as many actors as there is work for, without those that have ended what they had when
        their node was taken back."""
        for worker in [worker for worker in self._fleet.workers if worker.is_leaving and not worker.calls]:
            self._fleet.remove(worker)
        waiting = 0 if self._is_late() else len(self._queue)
        self._fleet.resize(min(self._fleet.max_actors(), waiting + self._in_flight()), self._rungs_wanted())

    def check_wait(self) -> None:
        """Raise ClusterLost if no actor is ready, and none will be."""
        self._wait.check(len(self._fleet.ready()))

    def hand_out(self) -> None:
        """Fill the ready actors, least busy first: a suspect for an empty one, else shares of the work ahead on its
        rung. Actors that stay empty change to a rung where concepts wait."""
        if self._is_late() or time.monotonic() < self._next_call:
            return
        # Counted here, and not anew for each actor: a loop must cost no more than in proportion to thousands of them.
        staying, enough = self._fleet.staying(), self._enough_ahead()
        num_actors, in_flight = Counter[int](), Counter[int]()
        for worker in self._fleet.workers:
            in_flight[worker.rung] += len(worker.calls)
            num_actors[worker.rung] += not worker.is_leaving
        ready = sorted((worker for worker in staying if worker.starting is None), key=lambda worker: len(worker.calls))
        for worker in ready:
            rung = worker.rung
            if not worker.calls and (suspect := self._queue.take_suspect(rung)):
                worker.runs_suspect = True
                self._call(worker, suspect)
                in_flight[rung] += 1
            share = min(worker.capacity, math.ceil((self._queue.num_ahead(rung) + in_flight[rung]) / num_actors[rung]))
            while not worker.runs_suspect and len(worker.calls) < share and (work := self._queue.take(rung)):
                self._call(worker, work)
                in_flight[rung] += 1
                self._queue.look_ahead(enough)
        for worker, rung in zip((worker for worker in ready if not worker.calls), self._rungs_wanted(), strict=False):
            if rung != worker.rung:
                self._fleet.change(worker, rung)

    def collect(self, timeout_s: float) -> Iterator[Ended]:
        """Wait until a call ends, an actor starts or a notice comes, and deal with every such event."""
        calls = {ref: worker for worker in self._fleet.workers for ref in worker.calls}
        for event in self._fleet.wait(calls, timeout_s):
            if event.ref in event.worker.calls:
                yield from self._on_answer(event.worker, event.ref, event.value, event.error)
            elif (error := self._fleet.take_note(event)) is not None:
                yield from self._on_actor_lost(event.worker, error)

    def replace_stalled(self) -> Iterator[Ended]:
        """Give up actors with a call that takes too long: a hung device or download raises nothing.

        The hung concept is to blame and not its neighbours.
        """
        limit_s = self._policy.stall_s or math.inf
        for worker in self._fleet.ready():
            if hung := worker.hung(limit_s):
                error = TimeoutError(f"not learned within {limit_s:.0f} s (actors.stall_s)")
                yield from self._on_actor_lost(worker, error, to_blame=hung)

    def drain(self) -> Iterator[Ended]:
        """Give running concepts time to write a checkpoint, then take the records of those that finished meanwhile."""
        busy = [worker for worker in self._fleet.ready() if worker.calls]
        if not busy:
            return
        log.warning("stopping: waiting up to %.0f s for %d concepts to save", self._policy.drain_s, self._in_flight())
        refs = [worker.handle.drain.remote(self._policy.drain_s) for worker in busy]
        ray.wait(refs, num_returns=len(refs), timeout=self._policy.drain_s + 5, fetch_local=False)
        yield from self.collect(timeout_s=0)

    def _enough_ahead(self) -> int:
        """Return how many tasks every actor that could exist would have at most."""
        return self._fleet.max_actors() * max((worker.capacity for worker in self._fleet.workers), default=1)

    def _rungs_wanted(self) -> Iterator[int]:
        """Yield the rungs to prepare further actors for, the lowest first: one for each concept that waits, without
        those for whom one is being prepared.

        So every concept is tried once before actors change to later tries, and the last tries are spread over all.
        """
        coming = Counter(worker.rung for worker in self._fleet.staying() if worker.starting is not None)
        for rung, number in self._queue.num_waiting().items():
            yield from repeat(rung, number - coming[rung])

    def _num_loaded(self) -> int:
        return sum(worker.is_loaded for worker in self._fleet.workers)

    def _is_late(self) -> bool:
        return time.time() >= self._until

    def _in_flight(self) -> int:
        return sum(len(worker.calls) for worker in self._fleet.workers)

    def _call(self, worker: Worker, work: Work) -> None:
        """Call an actor; the call counts as begun in time, although the deadline may pass meanwhile."""
        work.began = math.inf
        worker.call(work)
        worker.note_turns(self._policy.calls_ahead)

    def _note_turns(self, worker: Worker) -> None:
        """Note whose turn has come, unless it comes too late to count as begun."""
        if not self._is_late():
            worker.note_turns(self._policy.calls_ahead)

    def _on_answer(self, worker: Worker, ref: Any, record: Any, error: Exception | None) -> Iterator[Ended]:
        fate = actor_fate(error) if error is not None else "stays"
        if error is not None and fate == "lost":
            yield from self._on_actor_lost(worker, error)
            return
        facts = worker.facts
        work = worker.end_call(ref)
        self._note_turns(worker)
        if error is None:
            self._fruitless_deaths = 0
            self._store_failures = 0
            yield self._settle(work, record)
            return
        if fate == "leaves":
            self._fleet.mark_leaving(worker)
        verdict = decide(error, facts, work.facts, self._policy.max_attempts)
        if verdict.fate is Fate.FAIL and not verdict.is_quarantined:
            self._fruitless_deaths = 0
        yield from self._apply(verdict, work, facts, error)

    def _on_actor_lost(self, worker: Worker, error: Exception, to_blame: Collection[Work] = ()) -> Iterator[Ended]:
        """Remove a lost actor and decide about each of its concepts; with `to_blame`, only those are suspects."""
        facts = worker.facts
        log.warning("an actor with %d concepts was lost: %s", len(worker.calls), describe_error(error))
        self._fleet.remove(worker)
        lost = worker.take_calls()
        is_known = any(work.facts.lost_alone for work in lost)
        for work in lost:
            blame = not to_blame or work in to_blame
            verdict = decide(error, facts, work.facts, self._policy.max_attempts, is_to_blame=blame)
            yield from self._apply(verdict, work, facts, error)
        self._fruitless_deaths += not (is_known or proves_nothing(error, facts))
        if self._fruitless_deaths >= self._policy.max_fruitless_deaths:
            raise RunAborted(f"{self._fruitless_deaths} actors in a row died: {describe_error(error)}") from error

    def _apply(self, verdict: Verdict, work: Work, facts: ActorFacts, error: Exception) -> Iterator[Ended]:
        """Do with a concept what the verdict says; the one place where a failed call changes the queues."""
        work.facts = verdict.work
        self.retried += verdict.is_retry and verdict.fate not in (Fate.FAIL, Fate.ABORT)
        match verdict.fate:
            case Fate.HAND_BACK:
                self._queue.put_first(work, is_suspect=facts.runs_suspect)
            case Fate.RETRY | Fate.RETRY_ALONE:
                self._queue.put_again(work, is_suspect=verdict.fate is Fate.RETRY_ALONE)
            case Fate.WAIT_FOR_STORAGE:
                self._queue.put_first(work)
                self._pause_for_storage(error)
            case Fate.REPLAN:
                yield from self._plan_anew(work, error)
            case Fate.FAIL:
                self.quarantined += verdict.is_quarantined
                record = failure_record(work.task, verdict.text, work.facts.num_calls, verdict.kind)
                yield self._settle(work, dataclasses.replace(record, quarantined=verdict.is_quarantined))
            case Fate.ABORT:
                raise RunAborted(verdict.text) from error

    def _plan_anew(self, work: Work, error: Exception) -> Iterator[Ended]:
        """Put a concept whose photos have changed first in the queue, with the task of its photos as they are now."""
        name = work.task.concept.concept_id
        log.warning("concept %s is planned anew: %s", name, describe_error(error))
        try:
            if self._replan is None or work.task.rung:
                raise BadInput(f"{cause_of(error)}; run the same command again")
            work.task = self._replan(work.task)
            self._queue.put_first(work)
        except BadInput as reason:
            yield self._settle(work, failure_record(work.task, str(reason), work.facts.num_calls, BAD_INPUT))

    def _pause_for_storage(self, error: Exception) -> None:
        """Hand out nothing for a while, as the run's own storage fails in spite of all tries. Failures during a pause
        count with the one that began it."""
        if time.monotonic() < self._next_call:
            return
        self._store_failures += 1
        if self._store_failures >= self._policy.max_store_failures:
            raise StorageLost(
                f"storage failed {self._store_failures} times in a row: {describe_error(error)}"
            ) from error
        pause_s = backoff_s(self._store_failures, self._policy.backoff_s, LONGEST_PAUSE_S)
        self._next_call = time.monotonic() + pause_s
        log.warning("nothing new for %.0f s, as storage fails: %s", pause_s, describe_error(error))

    def _settle(self, work: Work, record: ConceptRecord) -> Ended:
        is_done = record.status == "done"
        if work.task.rung:
            self.tried_again += 1
        else:
            self.done += is_done
            self.failed += not is_done
        return work.task, record
