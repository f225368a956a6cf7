"""Actors that start, change their work and go, while Ray answers at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from pipeline import fleet as fleets
from pipeline.fleet import Fleet
from pipeline.store.errors import RunAborted
from pipeline.verdict import Policy
from pipeline.work_queue import Work
from tests.pipeline.runs import task

CAPACITY = 3


class Ref:
    """Reference to an answer, which may not be there yet."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer


class Handle:
    """An actor that notes what it is asked for."""

    def __init__(self, answer: Any = CAPACITY) -> None:
        self.told: list[str] = []
        self.noticed = Ref()
        self.prepare = SimpleNamespace(remote=lambda what: self.told.append(what) or Ref(answer))
        self.notice = SimpleNamespace(remote=lambda: self.told.append("notice") or self.noticed)


class InstantRay:
    """As much of Ray as a fleet uses."""

    def __init__(self) -> None:
        self.killed: list[Handle] = []

    def wait(self, refs: Sequence[Ref], num_returns: int, **_: Any) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.answer is not None][:num_returns], []

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, handle: Handle) -> None:
        self.killed.append(handle)


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> InstantRay:
    instant = InstantRay()
    monkeypatch.setattr(fleets, "ray", instant)
    return instant


def told(what: str) -> Any:
    return lambda handle: handle.prepare.remote(what)


def a_fleet(handles: list[Handle], **options: Any) -> Fleet:
    left = iter(handles)
    fleet = Fleet(lambda: next(left), Policy(max_actors=2, backoff_s=0.0), **options)  # type: ignore[arg-type,return-value]
    fleet.use(told("learn"))
    return fleet


def settle(fleet: Fleet) -> list[Exception | None]:
    return [fleet.take_note(event) for event in fleet.wait({}, 0.0)]


def test_what_happens_within_a_moment_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = a_fleet([Handle(), Handle(None)])
    fleet.resize(2)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        fleet.workers[1].starting.answer = CAPACITY

    monkeypatch.setattr(time, "sleep", pause)
    assert [event.worker for event in fleet.wait({}, 1.0)] == fleet.workers
    fleet.wait({Ref(): fleet.workers[0] for _ in range(100_000)}, 1.0)
    fleet.wait({}, 0.0)
    few, many, none = pauses
    assert 0.0 == none < few < many < 1.0


def test_actors_live_on_from_one_work_to_the_next(ray: InstantRay) -> None:
    handles = [Handle(), Handle(), Handle()]
    fleet = a_fleet(handles, keeps_idle=True)
    fleet.resize(2)
    assert fleet.ready() == []
    settle(fleet)
    assert [worker.capacity for worker in fleet.ready()] == [CAPACITY] * 2
    fleet.resize(0)
    fleet.use(told("learn by a rule"))
    assert fleet.ready() == []
    fleet.resize(2)
    settle(fleet)
    assert len(fleet.ready()) == 2
    assert [handle.told for handle in handles] == [["learn", "notice", "learn by a rule"]] * 2 + [[]]
    assert ray.killed == []
    fleet.dismiss()
    assert (fleet.workers, ray.killed) == ([], handles[:2])


def test_seconds_of_actors_are_counted_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    fleet = a_fleet([Handle(), Handle(), Handle()])
    assert fleet.actor_seconds() == 0.0
    fleet.resize(2)
    clock[0] += 5.0
    assert fleet.actor_seconds() == 10.0
    fleet.remove(fleet.workers[0])
    clock[0] += 1.0
    assert fleet.actor_seconds() == 11.0
    fleet.resize(2)
    clock[0] += 1.0
    fleet.dismiss()
    clock[0] += 99.0
    assert fleet.actor_seconds() == 13.0


def test_without_a_later_work_idle_actors_are_let_go() -> None:
    handles = [Handle(), Handle()]
    fleet = a_fleet(handles)
    fleet.resize(2)
    settle(fleet)
    fleet.workers[0].calls = {Ref(): Work(task("a"))}
    fleet.resize(1)
    assert [worker.handle for worker in fleet.workers] == [handles[0]]
    fleet.dismiss(only_busy=True)
    assert fleet.workers == []


def test_a_lost_actor_is_told_and_one_with_notice_is_replaced() -> None:
    handles = [Handle(), Handle(), Handle()]
    fleet = a_fleet(handles)
    fleet.resize(2)
    settle(fleet)
    handles[0].noticed.answer, handles[1].noticed.answer = True, RayActorError()
    (nothing, error) = settle(fleet)
    assert nothing is None
    assert isinstance(error, RayActorError)
    assert [worker.is_leaving for worker in fleet.workers] == [True, False]
    fleet.remove(fleet.workers[1])
    fleet.resize(1)
    assert [worker.handle for worker in fleet.staying()] == [handles[2]]


def test_an_actor_that_cannot_change_its_work_is_replaced(ray: InstantRay) -> None:
    broken, spare = Handle(), Handle()
    fleet = a_fleet([broken, spare], keeps_idle=True)
    fleet.resize(1)
    settle(fleet)
    fleet.use(lambda handle: Ref(RayActorError()) if handle is broken else handle.prepare.remote("other"))
    broken.noticed.answer = RayActorError()  # of the same death
    assert settle(fleet) == [None, None]
    assert (fleet.workers, ray.killed) == ([], [broken])
    fleet.resize(1)
    settle(fleet)
    assert [worker.handle for worker in fleet.ready()] == [spare]


def test_actors_that_do_not_start_end_the_run_unless_some_live() -> None:
    error = RayActorError()
    fleet = a_fleet([Handle(error), Handle(error), Handle(error)])
    for _ in range(2):
        fleet.resize(1)
        settle(fleet)
    fleet.resize(1)
    with pytest.raises(RunAborted, match="3 actors in a row did not start"):
        settle(fleet)
