"""The engine's thread with engines that learn nothing: who gets a slot, what follows an engine, how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.engine_thread import EngineThread
from pipeline.actor.job import Job
from pipeline.actor.slot_budget import SlotBudget
from pipeline.store.errors import ActorBroken, ActorLeaving
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task
from textual_inversion.engine import Assignment, Outcome, SlotState
from textual_inversion.slot_state import curve_tensor


class StandInEngine:
    """Learns each concept when it is told to, or does what its script says once it has one."""

    def __init__(self, script: Callable[[StandInEngine], None] | None = None) -> None:
        self.script = script
        self.steps_taken = 0
        self.stopped, self.may_end, self.is_full = threading.Event(), threading.Event(), threading.Event()
        self.taken: list[Assignment] = []

    def run(self, next_assignment: Any, on_outcome: Any, on_checkpoint: Any, _steps: int, **_previews: Any) -> None:
        while not self.stopped.is_set() and (assignment := next_assignment(True)):
            self.taken.append(assignment)
            self.steps_taken += 10
            self.is_full.set()
            if self.script is not None:
                self.script(self)
            while not (self.stopped.is_set() or self.may_end.is_set()):
                self.may_end.wait(0.01)
            if self.stopped.is_set():
                on_checkpoint(assignment.concept, SlotState.initial({"clip_l": torch.ones(1, 2)}))
                return
            on_outcome(Outcome(assignment.concept, None, 10, curve_tensor([]), 0.0, "no embedding"))

    def stop(self) -> None:
        self.stopped.set()

    def save_soon(self) -> None:
        pass

    def losses(self) -> list[float]:
        return []


class Actor:
    """What is around the thread."""

    def __init__(self, folder: Path, slots: int, engines: list[StandInEngine | Exception]) -> None:
        self.store = RunStore(str(folder))
        self.budget = SlotBudget(slots)
        self.jobs: dict[str, Job] = {}
        self.slots_asked: list[int] = []
        self._engines = iter(engines)
        checkpoints = Checkpoints(self.store)
        self.thread = EngineThread(self.new_engine, self.budget, self.jobs, checkpoints, 0)  # type: ignore[arg-type]

    def new_engine(self, slots: int) -> StandInEngine:
        self.slots_asked.append(slots)
        engine = next(self._engines)
        if isinstance(engine, Exception):
            raise engine
        return engine

    def submit(self, name: str) -> Job:
        one = task(name)
        job = self.jobs[name] = Job(one, 1, ConceptLog(self.store, one.folder, 1))
        job.assignment = Assignment(one.concept, SimpleNamespace())  # type: ignore[arg-type]
        self.thread.submit(job)
        return job


def out_of_memory(_: StandInEngine) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def bug(_: StandInEngine) -> None:
    raise KeyError("a mistake in the code")


def test_an_engine_without_memory_is_replaced_and_its_concepts_come_first(tmp_path: Path) -> None:
    crowded, after = StandInEngine(out_of_memory), StandInEngine()
    actor = Actor(tmp_path, 4, [torch.OutOfMemoryError("at the start"), crowded, after])
    assert actor.slots_asked == [4, 2]
    first = actor.submit("first")
    after.may_end.set()
    assert first.outcome.result(30).error == "no embedding"
    assert actor.slots_asked == [4, 2, 1]
    assert [one.concept.concept_id for one in after.taken] == ["first"]
    assert actor.thread.steps_taken == 20, "those of both engines"
    actor.thread.close()


def test_an_engine_that_is_stopped_for_memory_hands_over_its_states(tmp_path: Path) -> None:
    crowded, after = StandInEngine(), StandInEngine()
    actor = Actor(tmp_path, 2, [crowded, after])
    job = actor.submit("one")
    assert crowded.is_full.wait(30)
    assert actor.budget.report_shortage(2)
    actor.thread.shrink()
    after.may_end.set()
    assert job.outcome.result(30).error == "no embedding"
    assert after.taken[0].state is not None, "it goes on from the state that was handed over"
    assert actor.slots_asked == [2, 1]
    actor.thread.close()


def test_an_engine_that_is_stopped_by_mistake_is_replaced_by_an_equal_one(tmp_path: Path) -> None:
    former, after = StandInEngine(), StandInEngine()
    actor = Actor(tmp_path, 2, [former, after])
    job = actor.submit("one")
    assert former.is_full.wait(30)
    actor.thread.shrink()
    after.may_end.set()
    assert job.outcome.result(30).error == "no embedding"
    assert actor.slots_asked == [2, 2]
    actor.thread.close()


@pytest.mark.parametrize(
    ("script", "engines", "kind", "text"),
    [
        (bug, [], "bug", "KeyError: 'a mistake in the code'"),
        (out_of_memory, [], "lost_worker", "no memory for one slot: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_breaks_the_engine_ends_all_concepts_with_its_kind(
    tmp_path: Path, script: Callable[[StandInEngine], None], engines: list[Exception], kind: str, text: str
) -> None:
    actor = Actor(tmp_path, 1, [StandInEngine(script), *engines])
    job = actor.submit("one")
    with pytest.raises(ActorBroken, match=text) as broken:
        job.outcome.result(30)
    assert broken.value.kind == kind
    with pytest.raises(ActorBroken, match=text):
        actor.submit("late")


def test_a_file_that_was_replaced_before_another_engine_read_it_breaks_the_actor(tmp_path: Path) -> None:
    replaced = ValueError("replaced since it was loaded: inversion.penalties.captions is a before but b now")
    actor = Actor(tmp_path, 2, [StandInEngine(out_of_memory), replaced])
    with pytest.raises(ActorBroken, match="replaced since it was loaded") as broken:
        actor.submit("one").outcome.result(30)
    assert broken.value.kind == "lost_worker"


def test_settings_that_no_engine_takes_are_raised_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such layers"):
        Actor(tmp_path, 2, [ValueError("no such layers")])
    with pytest.raises(ActorBroken, match="no memory for one slot: OutOfMemoryError: too large"):
        Actor(tmp_path, 1, [torch.OutOfMemoryError("too large")])


def test_a_leaving_actor_hands_back_what_has_not_begun(tmp_path: Path) -> None:
    engine = StandInEngine()
    actor = Actor(tmp_path, 1, [engine])
    begun = actor.submit("begun")
    assert engine.is_full.wait(30)
    waiting = actor.submit("waiting")
    actor.thread.leave()
    engine.may_end.set()
    assert begun.outcome.result(30).error == "no embedding"
    with pytest.raises(ActorLeaving):
        waiting.outcome.result(30)
    actor.thread.close()


def test_closing_ends_an_idle_thread_and_gives_up_what_is_in_a_slot(tmp_path: Path) -> None:
    Actor(tmp_path / "idle", 1, [StandInEngine()]).thread.close()
    busy = Actor(tmp_path / "busy", 1, [StandInEngine()])
    job = busy.submit("one")
    busy.thread.close()
    with pytest.raises(ActorBroken, match="the engine was closed"):
        job.outcome.result(30)
