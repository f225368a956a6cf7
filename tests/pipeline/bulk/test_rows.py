"""Plans in parts, and results that say which rows are done."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk import rows
from pipeline.bulk.rows import StageRows, done_row_ids, plan_missing, put_plan, row_id
from pipeline.store.parquet import read_tables
from pipeline.store.storage import RunStore

RESULTS = "some/results"


def test_done_is_what_a_whole_part_says(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert done_row_ids(store, RESULTS) == set()
    part = pa.table({"row_id": ["x", "y"], "status": ["ok", "failed"], "error": [None, "too long"]})
    (tmp_path / RESULTS).mkdir(parents=True)
    pq.write_table(part, tmp_path / RESULTS / "one.parquet")
    whole = (tmp_path / RESULTS / "one.parquet").read_bytes()
    store.put(f"{RESULTS}/cut.parquet", whole[:-20])
    assert done_row_ids(store, RESULTS) == {"x"}
    assert set(store.list(RESULTS)) == {f"{RESULTS}/one.parquet"}


def test_a_shorter_plan_takes_the_place_of_a_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PLAN_PART_ROWS", 2)
    store, schema = RunStore(str(tmp_path)), pa.schema([("row_id", pa.string())])
    put_plan(store, "plan", ({"row_id": name} for name in "abcde"), schema)
    assert len(store.list("plan")) == 3
    put_plan(store, "plan", ({"row_id": name} for name in "xy"), schema)
    assert read_tables(tmp_path / "plan")["row_id"].to_pylist() == ["x", "y"]


def test_only_rows_without_a_good_result_are_planned(tmp_path: Path) -> None:
    store, schema = RunStore(str(tmp_path)), pa.schema([("row_id", pa.string())])
    asked = [{"row_id": each, "concept_id": f"of-{each}"} for each in "abcab"]
    found = plan_missing(store, "plan", iter(asked), schema, {"b", "gone"})
    assert found == StageRows({each: f"of-{each}" for each in "abc"}, {"a", "c"})
    assert found.num_done == 1
    assert read_tables(tmp_path / "plan")["row_id"].to_pylist() == ["a", "c"]
    assert plan_missing(store, "plan", iter(asked), schema, set("abc")).missing == set()
    assert store.list("plan") == {}


def test_an_id_stays_what_it_was_for_prompts_in_any_script() -> None:
    """Outputs hold rows under these ids; other ids would draw every such picture again."""
    assert row_id("f", "ein Foto", 7, {"steps": 2}) == "ae13e8e9c2fefb3e4fe8874be5e783fe"
    assert row_id("f", "猫の写真", 7, {"steps": 2}) == "31a59e5f496ab496a187c999090649ba"
