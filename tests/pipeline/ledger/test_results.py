from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.manifest import BadRow
from pipeline.ledger import results
from pipeline.ledger.records import ConceptRecord
from pipeline.ledger.results import write_results
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore


def make(concept_id: str, **values: Any) -> ConceptRecord:
    defaults: dict[str, Any] = {"status": "done", "placeholder_token": f"<{concept_id}>", "fingerprint": "0" * 32}
    return ConceptRecord(concept_id=concept_id, **{**defaults, **values})


def read(store: RunStore) -> Any:
    return read_table(io.BytesIO(store.get("results.parquet")))


def test_one_row_a_concept_bad_rows_included(root: str) -> None:
    store = RunStore(root)
    done = make(
        "a", scores={"clip_i": 0.5, "clip_t": 0.25}, images=("x.png",), steps=9, seconds=1.5, carried={"sku": 7}
    )
    failed = make("b", status="failed", error="out of memory", error_kind="lost_worker", carried={"sku": 8})
    bad = [BadRow(file="m.parquet", row=3, concept_id=None, reason="concept_id None", carried={"sku": 9})]
    assert write_results(store, [done, failed], bad) == 3
    first, second, third = read(store).to_pylist()
    assert (first["clip_i"], first["clip_t"], first["steps"], first["sku"]) == (0.5, 0.25, 9, 7)
    assert first["embedding"] == f"concepts/a/{'0' * 32}/learned_embeds.safetensors"
    assert first["images"] == ["x.png"]
    assert (second["status"], second["error"], second["sku"]) == ("failed", "out of memory", 8)
    assert (second["embedding"], second["clip_i"]) == (None, None)
    assert (first["error_kind"], second["error_kind"], third["error_kind"]) == ("", "lost_worker", "bad_input")
    assert (third["concept_id"], third["sku"]) == (None, 9)
    assert third["error"] == "m.parquet row 3: concept_id None"


def test_paths_are_absolute_if_asked_for(root: str) -> None:
    store = RunStore(root)
    write_results(store, [make("a")], absolute=True)
    (row,) = read(store).to_pylist()
    assert row["grid"] == store.uri(f"concepts/a/{'0' * 32}/grid.png")


def test_the_table_says_how_a_concept_is_prompted(root: str) -> None:
    store = RunStore(root)
    write_results(store, [make("a", prompt_as="<a> cat"), make("old"), make("b", status="failed")])
    assert [row["prompt_as"] for row in read(store).to_pylist()] == ["<a> cat", "<old>", ""]


def test_an_empty_run_has_an_empty_table(root: str) -> None:
    store = RunStore(root)
    assert write_results(store, []) == 0
    assert "concept_id" in read(store).schema.names


def test_carried_columns_give_way_to_ours_but_are_kept() -> None:
    store = RunStore("memory://names")
    carried = {"status": "sale", "clip_i": "own", "manifest_status": "taken", "note": "n"}
    write_results(store, [make("a", scores={"clip_i": 0.5}, carried=carried)])
    (row,) = read(store).to_pylist()
    assert (row["status"], row["clip_i"], row["note"]) == ("done", 0.5, "n")
    assert row["manifest_clip_i"] == "own"
    assert {row["manifest_status"], row["manifest_manifest_status"]} == {"sale", "taken"}


@pytest.mark.parametrize("batch_rows", [1, 2, 2000])
def test_carried_types_do_not_depend_on_where_a_batch_ends(batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_BATCH_ROWS", batch_rows)
    store = RunStore("memory://types")
    values: list[dict[str, Any]] = [
        {"number": 1, "mixed": 1, "text": "a", "nested": {"k": [1]}, "flag": True},
        {"number": 2.5, "mixed": "two", "text": None, "nested": None, "flag": None},
        {},
        {"number": None, "mixed": None, "text": "ü", "nested": [2], "late": "x", "flag": False},
    ]
    write_results(store, [make(f"c{i}", carried=carried) for i, carried in enumerate(values)])
    table = read(store)
    assert table["number"].to_pylist() == [1.0, 2.5, None, None]
    assert table["mixed"].to_pylist() == ["1", "two", None, None]
    assert table["text"].to_pylist() == ["a", None, None, "ü"]
    assert table["nested"].to_pylist() == ['{"k": [1]}', None, None, "[2]"]
    assert table["late"].to_pylist() == [None, None, None, "x"]
    assert table["flag"].to_pylist() == [True, None, None, False]


@pytest.mark.parametrize("batch_rows", [1, 2000])
@pytest.mark.parametrize(
    ("values", "type", "read_back"),
    [
        ([2**63 + 5, 2**64 - 1, None], "uint64", [2**63 + 5, 2**64 - 1, None]),
        ([2**63 - 1, -(2**63)], "int64", [2**63 - 1, -(2**63)]),
        ([2**63, -1], "string", [str(2**63), "-1"]),
        ([10**30], "string", [str(10**30)]),
        ([2**60 + 1, 0.5], "string", [str(2**60 + 1), "0.5"]),
        ([2**53, 0.5], "double", [2.0**53, 0.5]),
        ([True, 3], "string", ["true", "3"]),
        ([None, None], "null", [None, None]),
        (["a\udcff", "b"], "string", ["a?", "b"]),
        ([{}, [None, {"k": 2**70}]], "string", ["{}", f'[null, {{"k": {2**70}}}]']),
    ],
)
def test_every_value_is_written_as_it_is_or_as_text(
    values: list[Any], type: str, read_back: list[Any], batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_BATCH_ROWS", batch_rows)
    store = RunStore("memory://values")
    write_results(store, [make(f"c{i}", carried={"x": value}) for i, value in enumerate(values)])
    column = read(store)["x"]
    assert (str(column.type), column.to_pylist()) == (type, read_back)


def test_a_number_that_only_a_damaged_record_has_is_left_out() -> None:
    store = RunStore("memory://damaged")
    write_results(store, [make("a", steps=2**40), make("b", steps=7)])
    assert read(store)["steps"].to_pylist() == [None, 7]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(st.characters(codec=None), max_size=4), _json, max_size=4), max_size=4))
def test_no_carried_value_makes_the_table_fail(rows: list[dict[str, Any]]) -> None:
    store = RunStore("memory://any")
    assert write_results(store, [make(f"c{i}", carried=carried) for i, carried in enumerate(rows)]) == len(rows)
    assert read(store)["concept_id"].to_pylist() == [f"c{i}" for i in range(len(rows))]
