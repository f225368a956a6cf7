"""The dispatch benchmark on a handful of concepts; the stand-in actor stores what actors store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import dispatch
from benchmarks.dispatch import engine_share, known, plan_alone, write_manifest
from benchmarks.stand_ins import FILES, NoLearning
from pipeline.plan import finished
from pipeline.records import ConceptRecord, load_records
from pipeline.storage import RunStore
from tests.pipeline.runs import task


def test_planning_a_made_up_manifest(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m", 20)
    for hashed in (False, True):
        plan = plan_alone(str(manifest), 20, hashed)
        assert plan.seconds > 0
        assert plan.peak_mb > plan.added_mb
    with pytest.raises(ValueError, match="20 of 21 rows to do"):
        plan_alone(str(manifest), 21, hashed=False)
    assert known(["a", "b"])["a"] != known(["b"])["b"]


def test_a_stand_in_leaves_what_a_concept_leaves(tmp_path: Path) -> None:
    actor = NoLearning(3, str(tmp_path))
    record = asyncio.run(actor.learn(task("k"), 1))
    assert (actor.ready(), record.status) == (3, "done")
    store = RunStore(str(tmp_path))
    assert finished(store.scan("concepts")) == {b"f-k"}
    assert [each.concept_id for each in load_records(store)] == ["k"]
    assert {path.rpartition("/")[2]: size for path, size in store.scan("concepts")}.items() >= FILES.items()


def test_the_share_of_time_in_the_engine() -> None:
    def record(name: str, end: int, seconds: float) -> ConceptRecord:
        return ConceptRecord(concept_id=name, fingerprint=name, status="done", placeholder_token=name, seconds=seconds,
                             finished_at=f"2026-01-01T00:00:{end:02d}+00:00")  # fmt: skip

    assert engine_share([record("a", 10, 10), record("b", 20, 6)], 1) == pytest.approx(0.8)
    assert engine_share([record("a", 10, 10), record("b", 10, 8)], 2) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no finished concepts"):
        engine_share([], 1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--concepts", "30", "--actors", "1", "--capacities", "2", "--repetitions", "1", "--rows", "30"]
    assert dispatch.main(arguments) == 0
    said = capsys.readouterr().out
    for row in ("| empty | 2 |", "| storing | 2 |", "| 30 | known |", "| 30 | hashed |"):
        assert row in said
