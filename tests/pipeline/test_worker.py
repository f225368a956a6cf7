"""What the driver knows of an actor, from the calls that it makes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from pipeline.verdict import ActorFacts, WorkFacts
from pipeline.work_queue import Work
from pipeline.worker import Worker
from tests.pipeline.runs import task


def prepare(handle: Any) -> object:
    return handle.prepare.remote("settings")


class Handle:
    """Gives every call a reference of its own, and notes it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> SimpleNamespace:
        def remote(*arguments: Any) -> object:
            self.calls.append((method, *arguments))
            return object()

        return SimpleNamespace(remote=remote)


def test_an_actor_from_its_start_to_its_end() -> None:
    handle = Handle()
    worker = Worker.start(handle, prepare)
    assert worker.starting is not None
    worker.mark_ready(3)
    assert (worker.starting, worker.capacity) == (None, 3)
    assert worker.notice is not None
    first, second = Work(task("a")), Work(task("b"), WorkFacts(lost_calls=1, replans=1))
    worker.call(first)
    worker.call(second)
    assert handle.calls == [("prepare", "settings"), ("notice",), ("learn", first.task, 1), ("learn", second.task, 3)]
    worker.runs_suspect = True
    assert worker.facts == ActorFacts(num_calls=2, runs_suspect=True, is_leaving=False)
    assert worker.end_call(next(iter(worker.calls))) is first
    assert not worker.runs_suspect
    assert worker.take_calls() == [second]
    assert worker.calls == {}
    worker.prepare(prepare)
    assert worker.starting is not None
    worker.mark_ready(4)
    assert (worker.starting, worker.capacity) == (None, 4)
    assert handle.calls[4:] == [("prepare", "settings")]  # the notice is still waited for


def test_the_turn_of_a_call_comes_when_those_before_it_have_ended() -> None:
    worker = Worker.start(Handle(), prepare)
    worker.mark_ready(2)
    first, second = Work(task("a")), Work(task("b"))
    for work in (first, second):
        worker.call(work)
    worker.note_turns(calls_ahead=1)
    assert math.isfinite(first.began)
    assert math.isinf(second.began)
    assert worker.hung(limit_s=-1) == [first]
    worker.end_call(next(iter(worker.calls)))
    worker.note_turns(calls_ahead=1)
    assert math.isfinite(second.began)
    assert worker.hung(limit_s=3600) == []
