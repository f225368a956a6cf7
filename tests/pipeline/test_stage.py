"""What a Ray Data pass leaves behind: plans in parts, results that say what is done."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import stage
from pipeline.stage import cpus_for_actor, finished_rows, first_errors, put_plan
from pipeline.storage import RunStore

RESULTS = "some/results"


def test_done_is_what_a_whole_part_says(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert finished_rows(store, RESULTS) == set()
    part = pa.table({"row_id": ["x", "y"], "status": ["ok", "failed"], "error": [None, "too long"]})
    (tmp_path / RESULTS).mkdir(parents=True)
    pq.write_table(part, tmp_path / RESULTS / "one.parquet")
    whole = (tmp_path / RESULTS / "one.parquet").read_bytes()
    store.put(f"{RESULTS}/cut.parquet", whole[:-20])
    assert finished_rows(store, RESULTS) == {"x"}
    assert set(store.list(RESULTS)) == {f"{RESULTS}/one.parquet"}


@pytest.mark.parametrize(
    ("nodes", "actors", "each"),
    [([2.0], 2, 0.5), ([1.0], 1, 0.0), ([16.0], 1, 0.5), ([0.0, 1.0, 1.0], 2, 0.0), ([0.0, 2.0, 2.0], 2, 0.5),
     ([4.0, 4.0], 16, 0.375)],
)  # fmt: skip
def test_a_whole_core_is_left_for_reading_and_writing(nodes: list[float], actors: int, each: float) -> None:
    assert cpus_for_actor(nodes, actors) == each
    assert sum(nodes) - actors * each >= sum(cores > 0 for cores in nodes)  # so that some node has one


def test_a_few_distinct_causes(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    (tmp_path / RESULTS).mkdir(parents=True)
    errors = ["too long", None, "too long", "no embedding", "not asked for"]
    part = pa.table({"row_id": list("abcde"), "status": ["failed"] * 5, "error": errors})
    pq.write_table(part, tmp_path / RESULTS / "one.parquet")
    assert first_errors(store, RESULTS, set("abcd")) == ("too long", "no embedding")
    assert first_errors(store, RESULTS, set("abcd"), at_most=1) == ("too long",)


def test_a_shorter_plan_takes_the_place_of_a_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_PLAN_ROWS", 2)
    store, schema = RunStore(str(tmp_path)), pa.schema([("row_id", pa.string())])
    put_plan(store, "plan", ({"row_id": name} for name in "abcde"), schema)
    assert len(store.list("plan")) == 3
    put_plan(store, "plan", ({"row_id": name} for name in "xy"), schema)
    assert pq.read_table(tmp_path / "plan")["row_id"].to_pylist() == ["x", "y"]
