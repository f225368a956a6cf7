"""Concepts that wait for an actor, by the settings that they are learned by: the work ahead, pulled lazily, and
suspects, which run alone."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.ledger.plan import ConceptTask
from pipeline.verdict import WorkFacts

MOST_TRIES = 20_000
"""Concepts below the gate that may wait before more tasks are pulled, as each takes some memory of the driver."""


@dataclass(eq=False, slots=True)
class Work:
    """A concept on its way through the actors."""

    task: ConceptTask
    facts: WorkFacts = field(default_factory=WorkFacts)
    began: float = math.inf
    """Time when its turn came on its actor, monotonic seconds."""


class WorkQueue:
    """Two queues a rung: concepts that share actors, and suspects."""

    def __init__(self, tasks: Iterator[ConceptTask]) -> None:
        """Begin with nothing. `tasks` are pulled when they are needed; others may be added at any time."""
        self._tasks = tasks
        self._rung = 0
        """Rung of the task that was pulled last."""
        self._ahead: dict[int, deque[Work]] = defaultdict(deque)
        self._suspects: dict[int, deque[Work]] = defaultdict(deque)
        """Concepts that were on an actor when it died; each runs alone, so that one which kills actors takes no other
        with it."""

    def __len__(self) -> int:
        return sum(map(len, self._ahead.values())) + sum(map(len, self._suspects.values()))

    def num_ahead(self, rung: int) -> int:
        """Return how many concepts of a rung wait that are not suspects."""
        return len(self._ahead[rung])

    def num_waiting(self) -> dict[int, int]:
        """Return the number of concepts that wait, suspects included, by rung, the lowest rung first."""
        rungs = sorted({*self._ahead, *self._suspects})
        return {rung: len(self._ahead[rung]) + len(self._suspects[rung]) for rung in rungs}

    def look_ahead(self, enough: int) -> None:
        """Pull tasks until this many concepts of their rung wait that are not suspects, or the tasks end. None is
        pulled while `MOST_TRIES` more wait."""
        while len(self._ahead[self._rung]) < enough and len(self) < enough + MOST_TRIES:
            task = next(self._tasks, None)
            if task is None:
                return
            self._rung = task.rung
            self.add(task)

    def add(self, task: ConceptTask) -> None:
        """Put a concept at the end of the queue of its rung."""
        self._ahead[task.rung].append(Work(task))

    def take(self, rung: int) -> Work | None:
        """Remove and return the next concept of a rung that is no suspect."""
        return self._ahead[rung].popleft() if self._ahead[rung] else None

    def take_suspect(self, rung: int) -> Work | None:
        """Remove and return the next suspect of a rung."""
        return self._suspects[rung].popleft() if self._suspects[rung] else None

    def put_first(self, work: Work, *, is_suspect: bool = False) -> None:
        """Make a concept the next of its queue."""
        self._queue_of(work, is_suspect).appendleft(work)

    def put_again(self, work: Work, *, is_suspect: bool) -> None:
        """Put a concept whose call was lost at the end of its queue.

        A concept that lost an actor while it was alone comes first: the next call should show whether it is to blame.
        """
        if work.facts.lost_alone:
            self.put_first(work, is_suspect=is_suspect)
        else:
            self._queue_of(work, is_suspect).append(work)

    def _queue_of(self, work: Work, is_suspect: bool) -> deque[Work]:
        return (self._suspects if is_suspect else self._ahead)[work.task.rung]
