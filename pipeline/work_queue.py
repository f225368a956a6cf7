"""Concepts that wait for an actor: the work ahead, pulled lazily, and suspects, which run alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.ledger.plan import ConceptTask
from pipeline.verdict import WorkFacts


@dataclass(eq=False, slots=True)
class Work:
    """A concept on its way through the actors."""

    task: ConceptTask
    facts: WorkFacts = field(default_factory=WorkFacts)
    began: float = math.inf
    """Time when its turn came on its actor, monotonic seconds."""


class WorkQueue:
    """Two queues: concepts that share actors, and suspects."""

    def __init__(self, tasks: Iterator[ConceptTask]) -> None:
        self._tasks = tasks
        self._ahead: deque[Work] = deque()
        self._suspects: deque[Work] = deque()
        """Concepts that were on an actor when it died; each runs alone, so that one which kills actors takes no other
        with it."""

    def __len__(self) -> int:
        return len(self._ahead) + len(self._suspects)

    @property
    def num_ahead(self) -> int:
        """Concepts that are not suspects."""
        return len(self._ahead)

    def look_ahead(self, enough: int) -> None:
        """Pull tasks until this many concepts that are not suspects wait, or the tasks end."""
        while len(self._ahead) < enough:
            task = next(self._tasks, None)
            if task is None:
                return
            self._ahead.append(Work(task))

    def take(self) -> Work | None:
        """Remove and return the next concept that is no suspect."""
        return self._ahead.popleft() if self._ahead else None

    def take_suspect(self) -> Work | None:
        """Remove and return the next suspect."""
        return self._suspects.popleft() if self._suspects else None

    def put_first(self, work: Work, *, is_suspect: bool = False) -> None:
        """Make a concept the next of its queue."""
        (self._suspects if is_suspect else self._ahead).appendleft(work)

    def put_again(self, work: Work, *, is_suspect: bool) -> None:
        """Put a concept whose call was lost at the end of its queue.

        A concept that lost an actor while it was alone comes first: the next call should show whether it is to blame.
        """
        if work.facts.lost_alone:
            self.put_first(work, is_suspect=is_suspect)
        else:
            (self._suspects if is_suspect else self._ahead).append(work)
