"""An actor as the driver sees it: its handle, its calls, and what is known of its node."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.actor.interface import LearnerHandle
from pipeline.verdict import ActorFacts
from pipeline.work_queue import Work

Prepare = Callable[[LearnerHandle], Any]
"""Tells an actor what it is to get ready for, and returns the reference to the number of calls that it then takes at a
time."""


@dataclass(eq=False, slots=True)
class Worker:
    """An actor that starts or works."""

    handle: LearnerHandle
    starting: Any
    """Reference that resolves when the actor has loaded the model and is prepared; None from then on."""
    rung: int = 0
    """Rung whose concepts it is prepared, or being prepared, to learn (`ConceptTask.rung`)."""
    is_loaded: bool = False
    """True once it has loaded the model and was ready for the first time."""
    capacity: int = 1
    """Calls it takes at a time; known when it is ready."""
    calls: dict[Any, Work] = field(default_factory=dict)
    """Reference -> concept, in the order in which they were handed out."""
    notice: Any = None
    """Reference that resolves when its node is to be taken back; None before it is ready and after that notice."""
    is_leaving: bool = False
    """True if its node has notice: it finishes the calls that it has and gets no more."""
    runs_suspect: bool = False
    """True while it runs a suspect; it gets nothing else until that call ends."""
    began: float = field(default_factory=lambda: time.monotonic())
    """Moment at which it was started, in seconds of the monotonic clock."""

    @classmethod
    def start(cls, handle: LearnerHandle, prepare: Prepare, rung: int = 0) -> Worker:
        return cls(handle, starting=prepare(handle), rung=rung)

    def prepare(self, prepare: Prepare, rung: int = 0) -> None:
        """Let the actor, which must have no calls, get ready for something else; it is not ready until then."""
        assert not self.calls
        self.starting = prepare(self.handle)
        self.rung = rung

    def mark_ready(self, capacity: int) -> None:
        """Take note that the actor is prepared and how many calls it takes."""
        self.starting = None
        self.is_loaded = True
        self.capacity = capacity
        if self.notice is None and not self.is_leaving:
            self.notice = self.handle.notice.remote()

    @property
    def facts(self) -> ActorFacts:
        return ActorFacts(num_calls=len(self.calls), runs_suspect=self.runs_suspect, is_leaving=self.is_leaving)

    def call(self, work: Work) -> None:
        """Start the next attempt at a concept."""
        self.calls[self.handle.learn.remote(work.task, work.facts.num_calls + 1)] = work

    def note_turns(self, calls_ahead: int) -> None:
        """Note for each call whether its turn has come: an actor works on the calls that it has had longest, and
        `calls_ahead` of its capacity wait."""
        for work in islice(self.calls.values(), max(1, self.capacity - calls_ahead)):
            work.began = min(work.began, time.monotonic())

    def end_call(self, ref: Any) -> Work:
        """Remove a call that has ended, and return its concept."""
        self.runs_suspect = False
        return self.calls.pop(ref)

    def take_calls(self) -> list[Work]:
        """Remove all calls and return their concepts."""
        lost = list(self.calls.values())
        self.calls = {}
        return lost

    def hung(self, limit_s: float) -> list[Work]:
        """Return the concepts whose turn came more than `limit_s` ago."""
        now = time.monotonic()
        return [work for work in self.calls.values() if now - work.began > limit_s]
