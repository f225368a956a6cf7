"""Ask actors how far their concepts are, without waiting for the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
    """The last answer of each actor that lives."""

    def __init__(
        self, actors: Callable[[], Iterable[LearnerHandle]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`actors` returns those that live."""
        self._actors = actors
        self._clock = clock
        self._asked: dict[LearnerHandle, _Asked] = {}

    def in_flight(self) -> list[ConceptProgress]:
        """Return the concepts of all actors, as their last answers have them."""
        self._asked = {actor: self._asked.get(actor) or _Asked() for actor in self._actors()}
        waiting = {asked.question: asked for asked in self._asked.values() if asked.question is not None}
        if waiting:
            answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
            for question in answered:
                waiting[question].take()
        now = self._clock()
        every_s = max(_EVERY_S, len(self._asked) / _MAX_PER_S)
        for actor, asked in self._asked.items():
            if asked.question is None and now - asked.asked_at >= every_s:
                asked.question, asked.asked_at = actor.progress.remote(), now
        return [each for asked in self._asked.values() for each in asked.answer]


class _Asked:
    """The question that an actor has not answered yet, and its last answer."""

    def __init__(self) -> None:
        self.question: Any = None
        self.asked_at = float("-inf")
        self.answer: list[ConceptProgress] = []

    def take(self) -> None:
        """Take the answer; of an actor that is lost, about which the driver decides, none."""
        question, self.question = self.question, None
        try:
            self.answer = ray.get(question)
        except RayError:
            self.answer = []
