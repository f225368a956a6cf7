"""THE scheduling loop: bounded calls in flight, dead actors replaced, every task settled exactly once.

No numerics and no paths in here. Ray never restarts an actor (`max_restarts=0`): so each error names its true cause,
`verdict.decide` says what becomes of the concepts that were on the actor, and this module does it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from threading import Event
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.actor.interface import LearnerHandle
from pipeline.actor.publish import failure_record
from pipeline.actor_wait import ActorWait
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.progress import Progress
from pipeline.store.errors import RunAborted, StorageLost, describe_error
from pipeline.store.retries import backoff_s
from pipeline.verdict import ActorFacts, Fate, Policy, Verdict, actor_fate, cause_of, decide, proves_nothing
from pipeline.work_queue import Work, WorkQueue
from pipeline.worker import Worker
from textual_inversion.errors import BAD_INPUT, BadInput

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0

NewActor = Callable[[], LearnerHandle]

Replan = Callable[[ConceptTask], ConceptTask]
"""Returns a concept's task from its photos as they are now. Raises BadInput if there is none."""


def drive(
    tasks: Iterable[ConceptTask],
    new_actor: NewActor,
    policy: Policy,
    progress: Progress | None = None,
    stop: Event | None = None,
    *,
    until: float = math.inf,
    replan: Replan | None = None,
) -> Iterator[ConceptRecord]:
    """Run every task on actors and yield its record, done or failed. Raises RunAborted when the run cannot go on.

    `tasks` is pulled lazily, a little ahead of the actors. `new_actor()` starts an actor (`interface.LearnerActor`).
    When an actor has notice that its node is taken back, another is started at once. `replan` makes the new task of a
    concept whose photos have changed since its task was made; without it such a concept fails. When `stop` is set,
    nothing new is handed out, running concepts get `drain_s` to write checkpoints, and the iterator ends. From `until`
    on, in seconds since 1970, nothing new is handed out either, and the iterator ends when those concepts are finished
    whose turn had come by then.
    """
    fleet = _Fleet(iter(tasks), new_actor, policy, until, replan)
    stop = stop or Event()
    try:
        while fleet.has_work() and not stop.is_set():
            fleet.match_demand()
            fleet.check_wait()
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
    """The actors, the concepts on each, and the concepts that wait."""

    def __init__(
        self,
        tasks: Iterator[ConceptTask],
        new_actor: NewActor,
        policy: Policy,
        until: float,
        replan: Replan | None,
    ) -> None:
        self._until = until
        self._new_actor = new_actor
        self._policy = policy
        self._replan = replan
        self._workers: list[Worker] = []
        self._queue = WorkQueue(tasks)
        self._wait = ActorWait(policy.needs, policy.start_s)
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
        """Failed concepts that were given up after `max_attempts` lost calls."""

    def has_work(self) -> bool:
        if self._is_late():
            return any(math.isfinite(work.began) for worker in self._workers for work in worker.calls.values())
        self._queue.look_ahead(self._enough_ahead())
        return bool(len(self._queue) or self._in_flight())

    def counts(self) -> dict[str, int]:
        ready = len(self._ready())
        return {
            "retried": self.retried,
            "quarantined": self.quarantined,
            "in_flight": self._in_flight(),
            "ready": ready,
            "starting": len(self._workers) - ready,
        }

    def describe(self) -> str:
        ready = len(self._ready())
        starting = len(self._workers) - ready
        return f"{self._in_flight()} on {ready} actors" + (f" ({starting} starting)" if starting else "")

    def match_demand(self) -> None:
        """Start actors one by one while there is work for more, and let idle ones go when there is less.

        Actors that have not come up yet, and may never find a node, are let go first.
        """
        waiting = 0 if self._is_late() else len(self._queue)
        wanted = min(self._max_actors(), waiting + self._in_flight())
        staying = self._staying()
        idle = sorted((worker for worker in staying if not worker.calls), key=lambda worker: worker.starting is None)
        emptied = [worker for worker in self._workers if worker.is_leaving and not worker.calls]
        for worker in emptied + idle[: max(0, len(staying) - wanted)]:
            self._remove(worker)
        while len(self._staying()) < wanted and time.monotonic() >= self._next_start:
            if self._start_failures >= self._policy.max_start_failures and self._workers:
                return  # the actors that do live carry on alone
            self._workers.append(Worker.start(self._new_actor()))
            if self._start_failures:
                return  # after a failure, one at a time

    def check_wait(self) -> None:
        """Raise ClusterLost if no actor is ready, and none will be."""
        self._wait.check(len(self._ready()))

    def hand_out(self) -> None:
        """Fill the ready actors, least busy first: a suspect for an empty one, else shares of the work ahead."""
        if self._is_late() or time.monotonic() < self._next_call:
            return
        # Counted here, and not anew for each actor: a loop must cost no more than in proportion to thousands of them.
        in_flight, enough = self._in_flight(), self._enough_ahead()
        staying = self._staying()
        ready = [worker for worker in staying if worker.starting is None]
        for worker in sorted(ready, key=lambda worker: len(worker.calls)):
            if not worker.calls and (suspect := self._queue.take_suspect()):
                worker.runs_suspect = True
                self._call(worker, suspect)
                in_flight += 1
            share = min(worker.capacity, math.ceil((self._queue.num_ahead + in_flight) / len(staying)))
            while not worker.runs_suspect and len(worker.calls) < share and (work := self._queue.take()):
                self._call(worker, work)
                in_flight += 1
                self._queue.look_ahead(enough)

    def collect(self, timeout_s: float) -> Iterator[ConceptRecord]:
        """Wait until a call ends, an actor starts or a notice comes, and deal with every such event."""
        refs = {ref: worker for worker in self._workers for ref in worker.calls}
        refs |= {ref: worker for worker in self._workers for ref in (worker.starting, worker.notice) if ref is not None}
        if not refs:
            time.sleep(min(timeout_s, max(0.0, max(self._next_start, self._next_call) - time.monotonic())))
            return
        some, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        if not some:
            return
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        results = [(ref, refs[ref], _get(ref)) for ref in ready]
        # An actor that died may have finished other concepts first: take those before its calls become suspects.
        for ref, worker, (value, error) in sorted(results, key=lambda result: result[2][1] is not None):
            if ref is worker.starting:
                self._on_started(worker, value, error)
            elif ref is worker.notice:
                yield from self._on_notice(worker, error)
            elif ref in worker.calls:
                yield from self._on_answer(worker, ref, value, error)

    def replace_stalled(self) -> Iterator[ConceptRecord]:
        """Give up actors with a call that takes too long: a hung device or download raises nothing.

        The hung concept is to blame and not its neighbours.
        """
        limit_s = self._policy.stall_s or math.inf
        for worker in self._ready():
            if hung := worker.hung(limit_s):
                error = TimeoutError(f"not learned within {limit_s:.0f} s (actors.stall_s)")
                yield from self._on_actor_lost(worker, error, to_blame=hung)

    def drain(self) -> Iterator[ConceptRecord]:
        """Give running concepts time to write a checkpoint, then take the records of those that finished meanwhile."""
        busy = [worker for worker in self._ready() if worker.calls]
        if not busy:
            return
        log.warning("stopping: waiting up to %.0f s for %d concepts to save", self._policy.drain_s, self._in_flight())
        refs = [worker.handle.drain.remote(self._policy.drain_s) for worker in busy]
        ray.wait(refs, num_returns=len(refs), timeout=self._policy.drain_s + 5, fetch_local=False)
        yield from self.collect(timeout_s=0)

    def dismiss(self) -> None:
        for worker in list(self._workers):
            self._remove(worker)

    def _enough_ahead(self) -> int:
        """Return how many tasks every actor that could exist would have at most."""
        return self._max_actors() * max((worker.capacity for worker in self._workers), default=1)

    def _max_actors(self) -> int:
        return max(self._policy.max_actors, self._policy.actor_capacity() if self._policy.actor_capacity else 0)

    def _is_late(self) -> bool:
        return time.time() >= self._until

    def _ready(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.starting is None]

    def _staying(self) -> list[Worker]:
        return [worker for worker in self._workers if not worker.is_leaving]

    def _in_flight(self) -> int:
        return sum(len(worker.calls) for worker in self._workers)

    def _call(self, worker: Worker, work: Work) -> None:
        work.began = math.inf
        worker.call(work)
        self._note_turns(worker)

    def _note_turns(self, worker: Worker) -> None:
        """Note whose turn has come, unless it comes too late to count as begun."""
        if not self._is_late():
            worker.note_turns(self._policy.calls_ahead)

    def _on_started(self, worker: Worker, capacity: int, error: Exception | None) -> None:
        if error is None:
            worker.mark_ready(capacity)
            self._start_failures = 0
            return
        self._remove(worker)
        self._start_failures += 1
        self._next_start = time.monotonic() + self._pause_s(self._start_failures)
        log.warning("an actor did not start (%d in a row): %s", self._start_failures, describe_error(error))
        if self._start_failures >= self._policy.max_start_failures and not self._workers:
            raise RunAborted(
                f"{self._start_failures} actors in a row did not start: {describe_error(error)}"
            ) from error

    def _on_notice(self, worker: Worker, error: Exception | None) -> Iterator[ConceptRecord]:
        worker.notice = None
        if error is None:
            self._mark_leaving(worker)
        elif isinstance(error, RayTaskError):
            log.warning("an actor does not say when its node is taken back: %s", describe_error(error))
        else:
            yield from self._on_actor_lost(worker, error)

    def _mark_leaving(self, worker: Worker) -> None:
        if not worker.is_leaving:
            log.warning("the node of an actor with %d concepts is taken back: it gets no more", len(worker.calls))
        worker.is_leaving = True

    def _on_answer(self, worker: Worker, ref: Any, record: Any, error: Exception | None) -> Iterator[ConceptRecord]:
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
            yield self._settle(record)
            return
        if fate == "leaves":
            self._mark_leaving(worker)
        verdict = decide(error, facts, work.facts, self._policy.max_attempts)
        if verdict.fate is Fate.FAIL and not verdict.is_quarantined:
            self._fruitless_deaths = 0
        yield from self._apply(verdict, work, facts, error)

    def _on_actor_lost(
        self, worker: Worker, error: Exception, to_blame: Collection[Work] = ()
    ) -> Iterator[ConceptRecord]:
        """Remove a lost actor and decide about each of its concepts; with `to_blame`, only those are suspects."""
        facts = worker.facts
        log.warning("an actor with %d concepts was lost: %s", len(worker.calls), describe_error(error))
        self._remove(worker)
        lost = worker.take_calls()
        is_known = any(work.facts.lost_alone for work in lost)
        for work in lost:
            blame = not to_blame or work in to_blame
            verdict = decide(error, facts, work.facts, self._policy.max_attempts, is_to_blame=blame)
            yield from self._apply(verdict, work, facts, error)
        self._fruitless_deaths += not (is_known or proves_nothing(error, facts))
        if self._fruitless_deaths >= self._policy.max_fruitless_deaths:
            raise RunAborted(f"{self._fruitless_deaths} actors in a row died: {describe_error(error)}") from error

    def _apply(self, verdict: Verdict, work: Work, facts: ActorFacts, error: Exception) -> Iterator[ConceptRecord]:
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
                yield self._settle(dataclasses.replace(record, quarantined=verdict.is_quarantined))
            case Fate.ABORT:
                raise RunAborted(verdict.text) from error

    def _plan_anew(self, work: Work, error: Exception) -> Iterator[ConceptRecord]:
        """Put a concept whose photos have changed first in the queue, with the task of its photos as they are now."""
        name = work.task.concept.concept_id
        log.warning("concept %s is planned anew: %s", name, describe_error(error))
        try:
            if self._replan is None:
                raise BadInput(f"{cause_of(error)}; run the same command again")
            work.task = self._replan(work.task)
            self._queue.put_first(work)
        except BadInput as reason:
            yield self._settle(failure_record(work.task, str(reason), work.facts.num_calls, BAD_INPUT))

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
        pause_s = self._pause_s(self._store_failures)
        self._next_call = time.monotonic() + pause_s
        log.warning("nothing new for %.0f s, as storage fails: %s", pause_s, describe_error(error))

    def _pause_s(self, failures: int) -> float:
        return backoff_s(failures, self._policy.backoff_s, _LONGEST_PAUSE_S)

    def _settle(self, record: ConceptRecord) -> ConceptRecord:
        is_done = record.status == "done"
        self.done += is_done
        self.failed += not is_done
        return record

    def _remove(self, worker: Worker) -> None:
        worker.notice = None
        self._workers.remove(worker)
        ray.kill(worker.handle)


def _get(ref: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(ref), None
    except RayError as error:
        return None, error
