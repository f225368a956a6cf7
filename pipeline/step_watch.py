"""Ask actors how far their concepts are, without waiting for the answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.actor.interface import LearnerHandle
from pipeline.report.concept_progress import ConceptProgress

_EVERY_S = 2.0
"""Shortest time between two questions to one actor."""

_MAX_PER_S = 5.0
"""Questions in a second to all actors together: what the lines say is worth no more of the driver's time."""


class StepWatch:
    """The last answer of each actor that it has started."""

    def __init__(self, new_actor: Callable[[], LearnerHandle], clock: Callable[[], float] = time.monotonic) -> None:
        """`new_actor` starts an actor."""
        self._new_actor = new_actor
        self._clock = clock
        self._actors: list[_Asked] = []

    def new_actor(self) -> LearnerHandle:
        """Start an actor and watch it until it is lost."""
        handle = self._new_actor()
        self._actors.append(_Asked(handle))
        return handle

    def in_flight(self) -> list[ConceptProgress]:
        """Return the concepts of all actors, as their last answers have them."""
        asked = {actor.question: actor for actor in self._actors if actor.question is not None}
        if asked:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for question in answered:
                self._take(asked[question])
        now = self._clock()
        every_s = max(_EVERY_S, len(self._actors) / _MAX_PER_S)
        for actor in self._actors:
            if actor.question is None and now - actor.asked_at >= every_s:
                actor.question, actor.asked_at = actor.handle.progress.remote(), now
        return [each for actor in self._actors for each in actor.answer]

    def _take(self, actor: _Asked) -> None:
        """Take an answer; forget an actor that is lost, about which the driver decides."""
        try:
            actor.answer = ray.get(actor.question)
            actor.question = None
        except RayError:
            self._actors.remove(actor)


class _Asked:
    """An actor, the question that it has not answered yet, and its last answer."""

    def __init__(self, handle: LearnerHandle) -> None:
        self.handle = handle
        self.question: Any = None
        self.asked_at = float("-inf")
        self.answer: list[ConceptProgress] = []
