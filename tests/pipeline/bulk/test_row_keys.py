"""Plans and results of bulk pictures, whose ids are held as keys."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk import row_keys
from pipeline.bulk.row_keys import done_keys, first_errors, plan_missing_keys
from pipeline.ledger.key_index import KeySet, digest_words
from pipeline.store.parquet import read_tables
from pipeline.store.storage import RunStore

RESULTS = "some/results"


def keys_of(row_ids: str) -> KeySet:
    keys = KeySet()
    keys.add(digest_words(row_ids))
    return keys


def put_results(folder: Path, name: str, **columns: list[str | None]) -> None:
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / RESULTS / f"{name}.parquet")


@pytest.mark.parametrize("parts", [1, 2, 10])
def test_done_is_what_the_parts_say(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_keys, "_PARTS", parts)
    store = RunStore(str(tmp_path))
    assert len(done_keys(store, RESULTS)) == 0
    put_results(tmp_path, "one", row_id=["x", "y"], status=["ok", "failed"])
    put_results(tmp_path, "two", row_id=["y", "z", "x", None], status=["ok", "failed", "failed", "ok"])
    assert done_keys(store, RESULTS).has(digest_words("xyz")).tolist() == [True, True, False]


def test_a_few_distinct_causes(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    errors = ["too long", None, "too long", "no embedding", "not asked for"]
    put_results(tmp_path, "one", row_id=list("abcde"), status=["failed"] * 5, error=errors)
    assert first_errors(store, RESULTS, keys_of("abcd")) == ("too long", "no embedding")
    assert first_errors(store, RESULTS, keys_of("abcd"), at_most=1) == ("too long",)


@pytest.mark.parametrize("batch", [1, 2, 10])
def test_only_rows_without_a_good_result_are_planned_once(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_keys, "_BATCH", batch)
    store, schema = RunStore(str(tmp_path)), pa.schema([("row_id", pa.string())])
    asked = [{"row_id": each} for each in "caacbd"]
    wanted, missing = plan_missing_keys(store, "plan", iter(asked), schema, keys_of("bx"))
    assert read_tables(tmp_path / "plan")["row_id"].to_pylist() == ["c", "a", "d"]
    assert (len(wanted), len(missing)) == (4, 3)
    assert missing.has(digest_words("abcdx")).tolist() == [True, False, True, True, False]
    assert len(plan_missing_keys(store, "plan", iter(asked), schema, wanted)[1]) == 0
    assert store.list("plan") == {}
