"""Questions to actors, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from pipeline.report.concept_progress import ConceptProgress
from pipeline.step_watch import StepWatch


class Handle:
    """An actor whose answers a test gives."""

    def __init__(self) -> None:
        self.progress = self
        self.num_asked = 0

    def remote(self) -> Any:
        self.num_asked += 1
        return (self, self.num_asked)


def test_each_actor_is_asked_again_when_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[Any, Any] = {}

    def get(question: Any) -> Any:
        if isinstance(answers[question], Exception):
            raise answers[question]
        return answers[question]

    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([each for each in refs if each in answers], []))
    monkeypatch.setattr(ray, "get", get)
    now = [0.0]
    first, second = Handle(), Handle()
    living = [first, second]
    watch = StepWatch(lambda: living, clock=lambda: now[0])  # type: ignore[arg-type,return-value]
    assert watch.in_flight() == []
    mug = ConceptProgress(concept_id="mug", phase="learning", step=3, steps=9)
    answers[first, 1] = [mug]
    assert watch.in_flight() == [mug]
    assert (first.num_asked, second.num_asked) == (1, 1)
    now[0] = 2.0
    answers[second, 1] = RayActorError()
    assert watch.in_flight() == [mug]
    assert first.num_asked == 2
    living.remove(first)
    assert watch.in_flight() == []


def test_many_actors_are_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, five a second are asked on average."""
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", lambda _: [])
    now = [0.0]
    actors = [Handle() for _ in range(100)]
    watch = StepWatch(lambda: actors, clock=lambda: now[0])  # type: ignore[arg-type,return-value]
    for second in range(60):
        now[0] = float(second)
        watch.in_flight()
    assert {actor.num_asked for actor in actors} == {3}
