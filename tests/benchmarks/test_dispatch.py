"""The dispatch benchmark on a handful of concepts; the stand-in actor stores what actors store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import dispatch
from benchmarks.dispatch import engine_share, known, plan_once, write_manifest
from benchmarks.stand_ins import FILES, NoLearning
from pipeline.config import RunConfig
from pipeline.ledger.done import find_done
from pipeline.ledger.records import load_records
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task


def test_planning_a_made_up_manifest(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m", 20)
    for hashed in (False, True):
        plan = plan_once(str(manifest), 20, hashed)
        assert plan.seconds > 0
        assert plan.peak_mb > plan.added_mb
    with pytest.raises(ValueError, match="20 of 21 rows to do"):
        plan_once(str(manifest), 21, hashed=False)
    assert known(["a", "b"])["a"] != known(["b"])["b"]


def test_a_stand_in_leaves_what_a_concept_leaves(tmp_path: Path) -> None:
    actor = NoLearning(3, str(tmp_path))
    record = asyncio.run(actor.learn(task("k"), 1))
    assert (actor.prepare(RunConfig()), record.status) == (3, "done")
    store = RunStore(str(tmp_path))
    assert find_done(store).fingerprints == {b"f-k"}
    assert [each.concept_id for each in load_records(store)] == ["k"]
    assert {path.rpartition("/")[2]: size for path, size in store.scan("concepts")}.items() >= FILES.items()


def test_the_share_of_time_in_the_engine() -> None:
    def concept(process: int, begins: int, learned: int, seconds: float, published: int) -> bytes:
        told = [
            {"message": "begins", "host": "here", "process": process, "time": begins},
            {"message": "left the engine", "seconds": seconds, "time": learned},
            {"message": "published", "time": published},
        ]
        return "".join(
            json.dumps(line | {"time": f"2026-01-01T00:00:{line['time']:02d}+00:00"}) + "\n" for line in told
        ).encode()

    side_by_side = [concept(1, 0, 10, 8, 12), concept(1, 0, 14, 8, 16)]  # learned from 2 to 10 and from 6 to 14
    share = engine_share(side_by_side)
    assert share.learning == pytest.approx(12 / 14)
    assert share.whole == pytest.approx(12 / 16)
    share = engine_share([*side_by_side, concept(2, 10, 20, 10, 20)])
    assert share.learning == pytest.approx(22 / 24)
    with pytest.raises(ValueError, match="no concepts that were learned"):
        engine_share([])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--concepts", "30", "--actors", "1", "--capacities", "2", "--repetitions", "1", "--rows", "30"]
    assert dispatch.main(arguments) == 0
    said = capsys.readouterr().out
    for row in ("| empty | 2 |", "| storing | 2 |", "| 30 | known |", "| 30 | hashed |"):
        assert row in said
