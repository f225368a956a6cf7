"""Concepts that are tried again while others still learn: each actor has one settings at a time, and none waits for
all."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config import RunConfig
from pipeline.driver import drive
from pipeline.fleet import Fleet
from pipeline.ledger.records import ConceptRecord
from pipeline.report.progress import Progress, ProgressNumbers
from pipeline.verdict import Policy
from pipeline.work_queue import WorkQueue
from tests.pipeline.runs import task
from tests.pipeline.stand_ins import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

RUNGS = 2


def climb(
    names: list[str],
    notes: Path,
    capacity: int = 2,
    rungs: int = RUNGS,
    progress: Progress | None = None,
    on_record: Callable[[str, int], None] = lambda _name, _rung: None,
    **policy: Any,
) -> dict[tuple[str, int], ConceptRecord]:
    """Learn the concepts, and the poor ones again on each rung; return their records by name and rung."""
    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1)(StandIn)
    fleet = Fleet(lambda: actor_class.remote(str(notes), capacity), Policy(**{"backoff_s": 0.01} | policy))
    queue = WorkQueue(iter([task(name) for name in names]))
    records = {}
    try:
        for one, record in drive(queue, fleet, [RunConfig(seed=rung) for rung in range(rungs + 1)], progress):
            name = one.concept.concept_id
            assert record.concept_id == name
            assert (name, one.rung) not in records
            records[name, one.rung] = record
            on_record(name, one.rung)
            if name.startswith("poor") and one.rung < rungs:
                rung = one.rung + 1
                queue.add(replace(one, rung=rung, fingerprint=f"f-{name}-{rung}"))
    finally:
        fleet.dismiss()
    return records


def prepared(notes: Path) -> list[list[int]]:
    """Return the rungs that each actor was prepared for."""
    return [[int(rung) for rung in path.read_text().split()] for path in notes.glob("prepared.*")]


def test_a_concept_is_tried_again_while_another_is_learned_for_the_first_time(tmp_path: Path) -> None:
    def release(name: str, rung: int) -> None:
        assert (name == "held-0") == (tmp_path / "end.held-0").exists(), "it ends last, as nothing else lets it end"
        if (name, rung) == ("poor-0", RUNGS):
            (tmp_path / "end.held-0").touch()

    names = ["held-0", "poor-0"]
    records = climb(names, tmp_path, 1, on_record=release, max_actors=2, stall_s=400.0, max_attempts=1)
    assert list(records) == [("poor-0", 0), ("poor-0", 1), ("poor-0", 2), ("held-0", 0)]
    assert {record.status for record in records.values()} == {"done"}
    assert sorted(prepared(tmp_path)) == [[0], [0, 1, 2]]


def test_an_actor_changes_its_settings_when_it_has_no_more_to_do_by_them(tmp_path: Path) -> None:
    told = list[ProgressNumbers]()
    progress = Progress("learning", lambda: 6, stream=io.StringIO(), observe=told.append)
    names = ["poor-0", "fine-0", "poor-1", "poor-2", "fine-1", "poor-3"]
    records = climb(names, tmp_path, progress=progress, max_actors=1)
    assert prepared(tmp_path) == [[0, 1, 2]]
    assert [rung for _, rung in records] == [0] * 6 + [1] * 4 + [2] * 4
    assert {record.fingerprint for record in records.values()} == {
        *(f"f-{name}" for name in names), *(f"f-poor-{number}-{rung}" for number in range(4) for rung in (1, 2))
    }  # fmt: skip
    assert [told[-1][name] for name in ("done", "failed", "tried_again", "trying_again")] == [6, 0, 8, 0]
    assert max(numbers["done"] for numbers in told) == 6, "a try counts as no other concept"
    assert any(numbers["trying_again"] for numbers in told)
    is_up = next(place for place, numbers in enumerate(told) if numbers["ready"])
    assert {numbers["starting"] for numbers in told[is_up:]} == {0}, "an actor that changes its settings has a model"


def test_a_try_that_kills_actors_ends_alone(tmp_path: Path) -> None:
    names = ["poor-0", "poor-killer-0", "fine-0", "poor-moving-0", "poor-unlucky-0"]
    records = climb(names, tmp_path, rungs=1, max_actors=2)
    assert len(records) == 5 + 4
    failed = {key: record for key, record in records.items() if record.status == "failed"}
    assert set(failed) == {("poor-killer-0", 1), ("poor-moving-0", 1)}, "the first try of each is done"
    assert failed["poor-killer-0", 1].quarantined
    assert failed["poor-killer-0", 1].attempts == 3
    assert "run the same command again" in failed["poor-moving-0", 1].error
    assert records["poor-unlucky-0", 1].attempts > 1
