"""Which concepts a command learns: by name, by number, by having failed before."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.ledger.results import write_results
from pipeline.ledger.selection import Selection, failed_before, nearest, select
from pipeline.sample_config import GateConfig
from pipeline.store.storage import RunStore


def record(concept_id: str, number: int, status: str) -> ConceptRecord:
    return ConceptRecord(
        concept_id=concept_id,
        fingerprint=f"{number:032x}",
        status=status,
        placeholder_token="<x>",  # type: ignore[arg-type]
    )


@pytest.fixture
def manifest(root: str) -> str:
    store, buffer = RunStore(root), io.BytesIO()
    names = ["tiger", "taxi", "red-mug", "42"]
    pq.write_table(pa.table({"concept_id": names, "images": [["a.png"]] * len(names)}), buffer)
    store.put("m.parquet", buffer.getvalue())
    return store.uri("m.parquet")


def test_ids_and_a_number(manifest: str, root: str) -> None:
    store = RunStore(root)
    assert select(manifest, store, None, None, None) == Selection()
    chosen = select(manifest, store, "tiger, 42", None, 1)
    assert chosen == Selection(frozenset({"tiger", "42"}), 1, "--only tiger, 42 --limit 1")


@pytest.mark.parametrize(
    ("only", "limit", "message"),
    [
        ("tigre", None, r"no concept 'tigre' in manifest .*m.parquet: did you mean tiger\?"),
        ("Red-Mug", None, r"did you mean red-mug\?"),
        ("zebra", None, r"there are 4, such as 42, red-mug"),
        (" ,", None, "name at least one"),
        (None, 0, "--limit 0: must be 1 or more"),
    ],
)
def test_mistakes_are_named(only: str | None, limit: int | None, message: str, manifest: str, root: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(manifest, RunStore(root), only, None, limit)


def test_what_failed_before(root: str, manifest: str) -> None:
    store = RunStore(root)
    assert failed_before(store) == set()
    for name, number, status in (("a", 1, "failed"), ("b", 2, "done"), ("c", 3, "done"), ("c", 4, "failed")):
        put_record(store, record(name, number, status))
    store.put(record("d", 5, "done").folder.checkpoint, b"half way")
    assert failed_before(store) == {"a", "c"}
    bad = [BadRow(file="m", row=1, concept_id=name, reason="no such photo") for name in ("e", None)]
    write_results(store, [record("b", 2, "done")], bad)
    assert failed_before(store) == {"a", "c", "e"}
    assert select(manifest, store, "tiger", "failed", None).only == frozenset()


def test_what_was_given_up_after_lost_calls(root: str, manifest: str) -> None:
    store = RunStore(root)
    put_record(store, replace(record("tiger", 1, "failed"), quarantined=True))
    put_record(store, record("taxi", 2, "failed"))
    for name, number, status in (("42", 3, "done"), ("42", 4, "failed")):
        put_record(store, replace(record(name, number, status), quarantined=status == "failed"))
    assert select(manifest, store, None, "failed", None).only == {"tiger", "taxi", "42"}
    assert select(manifest, store, None, "quarantined", None).only == {"tiger", "42"}
    assert select(manifest, store, "taxi", "quarantined", None).only == frozenset()


def test_what_is_below_the_present_gate(root: str, manifest: str) -> None:
    store = RunStore(root)
    scores = {"tiger": 0.3, "taxi": 0.5, "42": 0.6}
    for number, (name, clip_i) in enumerate(scores.items()):
        put_record(store, replace(record(name, number, "done"), scores={"clip_i": clip_i}))
    older = replace(record("42", 9, "done"), scores={"clip_i": 0.1}, finished_at="2020-01-01T00:00:00+00:00")
    put_record(store, older)
    put_record(store, replace(record("42", 2, "done"), scores={"clip_i": 0.6}, finished_at="2021-01-01T00:00:00+00:00"))
    chosen = select(manifest, store, None, "below-gate", 5, GateConfig(min_clip_i=0.55))
    assert chosen == Selection(frozenset({"tiger", "taxi"}), 5, "--retry below-gate --limit 5", retries_below_gate=True)


def test_nearest_names() -> None:
    assert nearest("Tigger", ["tiger", "taxi"]) == ["tiger"]
    assert nearest("mug", ["blue-ceramic-mug-0012", "cat"]) == ["blue-ceramic-mug-0012"]
    assert nearest("zebra", ["tiger"]) == []
