"""The scheduling loop's own work, counted in calls of functions while Ray and the actors answer at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import fleet
from pipeline.actor.publish import record_of
from pipeline.verdict import Policy
from tests.pipeline.fleets import drive_alone
from tests.pipeline.runs import task

CAPACITY = 6


class Ref:
    """Reference to an answer that is there."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Handle:
    """An actor that answers every call at once, and never has notice."""

    def __init__(self) -> None:
        self.prepare = SimpleNamespace(remote=lambda _settings: Ref(CAPACITY))
        self.notice = SimpleNamespace(remote=lambda: Ref(None))
        self.learn = SimpleNamespace(remote=lambda task, attempt: Ref(record_of(task, "done", attempt)))


class InstantRay:
    """As much of Ray as the loop uses; a reference to a notice never resolves."""

    def wait(self, refs: Sequence[Ref], num_returns: int, **_: Any) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.answer is not None][:num_returns], []

    def get(self, ref: Ref) -> Any:
        return ref.answer

    def kill(self, handle: Handle) -> None:
        pass


def calls_per_concept(num_actors: int) -> float:
    """Return how many functions are called for a concept where each actor learns 20 in all."""
    tasks = [task(f"c{number}") for number in range(20 * num_actors)]
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        records = list(drive_alone(tasks, Handle, Policy(max_actors=num_actors)))  # type: ignore[arg-type]
    finally:
        sys.setprofile(before)
    assert len(records) == len(tasks)
    return calls / len(tasks)


def test_a_concept_costs_the_driver_no_more_with_more_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ray", InstantRay())
    few, many = calls_per_concept(20), calls_per_concept(200)
    assert many < 1.5 * few, f"{few:.0f} calls for a concept with 20 actors, {many:.0f} with 200"
