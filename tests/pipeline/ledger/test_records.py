from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pipeline.ledger.record_parts import PartWriter
from pipeline.ledger.records import (
    ConceptRecord,
    StoredFile,
    add_to_part,
    from_json,
    latest,
    load_records,
    put_record,
    read_record,
    to_json,
)
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import now
from tests.pipeline.s3_memory import S3Memory


def make(concept_id: str = "cat", number: int = 0, **values: Any) -> ConceptRecord:
    defaults: dict[str, Any] = {"status": "done", "placeholder_token": f"<{concept_id}>"}
    return ConceptRecord(concept_id=concept_id, fingerprint=f"{number:032x}", **{**defaults, **values})


FULL = make(
    initializer="cat",
    images=("a.png",),
    error="",
    attempts=2,
    steps=500,
    seconds=12.5,
    finished_at=now(),
    scores={"clip_i": 0.8},
    files={"grid.png": StoredFile(bytes=3, sha256="ab")},
    carried={"sku": 1, "tags": ["x"]},
    inputs={"images": ["00"], "settings": "11"},
)


def test_a_record_survives_json() -> None:
    assert from_json(to_json(FULL)) == FULL


def test_newer_keys_are_ignored_and_optional_ones_may_be_absent() -> None:
    tree = json.loads(to_json(FULL)) | {"invented_later": {"x": 1}}
    del tree["digest"]  # earlier releases wrote none
    assert from_json(json.dumps(tree).encode()) == FULL
    required = {name: tree[name] for name in ("concept_id", "fingerprint", "status", "placeholder_token")}
    assert from_json(json.dumps(required).encode()) == make()


@pytest.mark.parametrize("name", ["concept_id", "fingerprint", "status", "placeholder_token"])
def test_a_missing_required_key_is_named(name: str) -> None:
    tree = json.loads(to_json(FULL))
    del tree[name]
    with pytest.raises(ValueError, match=name):
        from_json(json.dumps(tree).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"status": "perhaps"}'])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a concept record"):
        from_json(data)


def test_a_failure_is_kept_apart_from_done(root: str) -> None:
    store = RunStore(root)
    folder = put_and_folder(store, make(status="failed", error="out of memory"))
    assert store.list() == {folder.failure: len(store.get(folder.failure))}
    with pytest.raises(FileNotFoundError):
        read_record(store, folder)
    put_record(store, make(steps=5))
    assert read_record(store, folder).steps == 5


def put_and_folder(store: RunStore, record: ConceptRecord) -> ConceptFolder:
    put_record(store, record)
    return record.folder


def test_loading_takes_the_record_else_the_failure(root: str) -> None:
    store = RunStore(root)
    assert list(load_records(store)) == []
    put_record(store, make("a", 1, status="failed", error="first try"))
    put_record(store, make("a", 1))
    put_record(store, make("b", 2, status="failed", error="still"))
    store.put(make("c", 3).folder.embedding, b"no record yet")
    assert {record.concept_id: record.status for record in load_records(store)} == {"a": "done", "b": "failed"}


def test_loading_for_a_plan_takes_its_fingerprints_in_its_order_with_todays_columns(root: str) -> None:
    store = RunStore(root)
    for name, number in (("a", 1), ("a", 2), ("b", 3), ("gone", 4)):
        put_record(store, make(name, number, carried={"price": 1}))
    keys = [f"{number:032x}".encode() for number in (3, 2, 99)]
    records = list(load_records(store, dict.fromkeys(keys, b'{"price": 2}')))
    assert [(record.concept_id, record.fingerprint[-1]) for record in records] == [("b", "3"), ("a", "2")]
    assert [record.carried for record in records] == [{"price": 2}] * 2


def test_a_damaged_record_is_a_failure_with_its_cause(root: str) -> None:
    store = RunStore(root)
    store.put(make("a", 1).folder.record, b'{"concept_id": "a"')
    store.put(make("b", 2).folder.record, to_json(make("other", 3)))
    put_record(store, make("c", 4))
    records = {record.concept_id: record for record in load_records(store)}
    assert {name: record.status for name, record in records.items()} == {"a": "failed", "b": "failed", "c": "done"}
    assert "the next run learns it again" in records["a"].error
    assert "it is the record of concepts/other" in records["b"].error


def test_the_latest_of_a_concepts_records() -> None:
    old = make("a", 1, finished_at="2026-01-01T00:00:00+00:00")
    new = dataclasses.replace(old, fingerprint="2" * 32, finished_at="2026-02-01T00:00:00+00:00")
    other = make("b", 3)
    assert latest(iter([new, other, old])) == [new, other]


@pytest.mark.slow
def test_loading_on_s3_is_a_listing_and_one_request_a_record(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    for number in range(5):
        put_record(store, make(f"c{number}", number))
    s3_calls.clear()
    assert len(list(load_records(store, update_cache=True))) == 5
    assert sorted(s3_calls) == ["GetObject"] * 5 + ["ListObjectsV2"] * 2 + ["PutObject"]


@pytest.mark.slow
def test_records_on_s3_are_remembered_and_those_that_change_read_anew(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    for number in range(5):
        put_record(store, make(f"c{number}", number))
    first = list(load_records(store, update_cache=True))
    s3_calls.clear()
    assert list(load_records(store, update_cache=True)) == first
    assert s3_calls == ["ListObjectsV2", "ListObjectsV2", "GetObject"]
    changed = make("c3", 3, error="some other size")
    put_record(store, changed)
    put_record(store, make("c9", 9))
    s3_calls.clear()
    again = {record.concept_id: record for record in load_records(store, update_cache=True)}
    assert again["c3"] == changed
    assert len(again) == 6
    assert sorted(s3_calls) == ["GetObject"] * 3 + ["ListObjectsV2"] * 2 + ["PutObject"]
    store.put("records/0-part.parquet", b"cut sho")
    assert len(list(load_records(store))) == 6


def test_a_record_that_the_driver_had_in_hand_is_not_read(s3_memory: S3Memory) -> None:
    """Those of a run on S3, where another actor has written one anew meanwhile, and a failure."""
    store = RunStore("s3://catalog/out")
    parts = PartWriter(store)
    made = [make(f"c{number}", number, scores={"clip_i": number / 7}) for number in range(20)]
    made[7] = make("c7", 7, status="failed", error="no photo")
    for record in made:
        put_record(store, record)
        add_to_part(parts, record)
    parts.flush()
    made[3] = dataclasses.replace(made[3], attempts=2)  # of the same size
    put_record(store, made[3])
    s3_memory.requests.clear()
    assert sorted(load_records(store, update_cache=True), key=lambda each: each.fingerprint) == made
    assert s3_memory.requests == {"list": 2, "get": 2, "put": 1}
    s3_memory.requests.clear()
    assert sorted(load_records(store, update_cache=True), key=lambda each: each.fingerprint) == made
    assert s3_memory.requests == {"list": 2, "get": 2}, "two parts"


def test_where_tags_are_no_md5_the_records_are_read_once(s3_memory: S3Memory) -> None:
    s3_memory.tag_salt = b"the owner's key"
    store = RunStore("s3://catalog/out")
    parts = PartWriter(store)
    for number in range(5):
        put_record(store, make(f"c{number}", number))
        add_to_part(parts, make(f"c{number}", number))
    parts.flush()
    for gets in (5 + 1, 2):
        s3_memory.requests.clear()
        assert len(list(load_records(store, update_cache=True))) == 5
        assert s3_memory.requests["get"] == gets


def test_what_is_no_record_is_read_each_time(s3_memory: S3Memory) -> None:
    store = RunStore("s3://catalog/out")
    put_record(store, make("a", 1))
    store.put(make("b", 2).folder.record, b"garbage")
    for gets in (2, 2):
        s3_memory.requests.clear()
        found = {record.concept_id: record for record in load_records(store, update_cache=True)}
        assert (found["a"].status, found["b"].is_damaged) == ("done", True)
        assert s3_memory.requests["get"] == gets
