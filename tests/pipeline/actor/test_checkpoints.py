"""Checkpoints of an actor's concepts: what is stored, in which order, and what is left in the end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.job import Job
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task
from textual_inversion.engine import SlotState


def state(value: float) -> SlotState:
    return SlotState.initial({"clip_l": torch.full((1, 2), value)})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    one = task("toy")
    return Job(one, 1, ConceptLog(RunStore(str(tmp_path)), one.folder, 1))


def held(checkpoints: Checkpoints, job: Job) -> float | None:
    found = checkpoints.load(job)
    return None if found is None else float(found.parameters["clip_l"][0, 0])


def test_a_state_is_stored_loaded_and_deleted(tmp_path: Path, job: Job) -> None:
    checkpoints = Checkpoints(RunStore(str(tmp_path)))
    assert held(checkpoints, job) is None
    assert not job.was_saved
    checkpoints.save(job, state(1.0), is_last=False)
    assert job.save is not None
    job.save.result(30)
    assert (held(checkpoints, job), job.num_saves) == (1.0, 1)
    checkpoints.delete(job)
    assert held(checkpoints, job) is None
    checkpoints.close()


def test_a_damaged_checkpoint_is_told_and_deleted_in_the_end(tmp_path: Path, job: Job) -> None:
    store = RunStore(str(tmp_path))
    store.put(job.task.folder.checkpoint, b"cut sh")
    checkpoints = Checkpoints(store)
    assert checkpoints.load(job) is None
    checkpoints.delete(job)
    assert not store.exists(job.task.folder.checkpoint)


def test_while_one_is_on_its_way_only_the_last_follows_it(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, put = threading.Event(), RunStore.put

    def slow(self: RunStore, path: str, data: bytes) -> None:
        assert gate.wait(30)
        put(self, path, data)

    monkeypatch.setattr(RunStore, "put", slow)
    checkpoints = Checkpoints(RunStore(str(tmp_path)))
    checkpoints.save(job, state(1.0), is_last=False)
    checkpoints.save(job, state(2.0), is_last=False)
    checkpoints.save(job, state(3.0), is_last=True)
    gate.set()
    checkpoints.close()
    assert (held(checkpoints, job), job.num_saves) == (3.0, 2)


def test_a_store_that_fails_costs_a_checkpoint_and_a_bug_is_raised(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def mistaken(*_: object) -> None:
        raise KeyError("a mistake in the code")

    checkpoints = Checkpoints(RunStore(str(tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "put", full)
        checkpoints.save(job, state(1.0), is_last=False)
        assert job.save is not None
        job.save.result(30)
    assert job.num_saves == 0
    monkeypatch.setattr(SlotState, "to_bytes", mistaken)
    checkpoints.save(job, state(2.0), is_last=True)
    with pytest.raises(KeyError, match="a mistake in the code"):
        checkpoints.delete(job)
