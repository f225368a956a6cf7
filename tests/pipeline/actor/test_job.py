"""Tests of the progress that a job reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.job import Job, progress_of
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task
from textual_inversion.slots import SlotProgress


def test_a_job_goes_through_its_phases(tmp_path: Path) -> None:
    one = task("mug")
    job = Job(one, 1, ConceptLog(RunStore(str(tmp_path)), one.folder, 1))
    phases = [progress_of(job, None)]
    job.assignment = cast(Any, object())
    phases.append(progress_of(job, None))
    in_slot = SlotProgress("mug", step=30, steps=40, loss=0.5)
    phases.append(progress_of(job, in_slot))
    job.outcome.set_result(cast(Any, object()))
    phases.append(progress_of(job, in_slot))  # the engine has not freed the slot yet
    assert [each.phase for each in phases] == ["preparing", "waiting", "learning", "publishing"]
    assert [each.share_done for each in phases] == [0.0, 0.0, 0.75, 1.0]
    assert phases[2].loss == 0.5
