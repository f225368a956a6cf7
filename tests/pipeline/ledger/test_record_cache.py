"""The copy of all records: what is kept is found again, and neither making nor reading it fills the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.ledger import record_cache
from pipeline.ledger.record_cache import PATH, RecordCache
from pipeline.store.storage import RunStore
from tests.pipeline.s3_memory import S3Memory


@pytest.fixture
def store(s3_memory: S3Memory) -> RunStore:
    assert s3_memory.objects is not None
    return RunStore("s3://catalog/out")


def contents(count: int, size: int = 20) -> Iterator[tuple[str, bytes]]:
    random_bytes = random.Random(0).randbytes
    for number in range(count):
        yield f"concepts/c{number}/record.json", random_bytes(size)


def test_what_was_kept_is_found_until_it_changes(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_cache, "_BATCH", 3)
    first = RecordCache(store)
    assert not first.knows("concepts/c0/record.json")
    for path, content in contents(7):
        first.keep(path, len(content), 5.0, content)
    first.store()
    again = RecordCache(store)
    for path, content in contents(7):
        assert again.content(path, 20, 5.0) == content
        assert again.content(path, 20, 6.0) is None, "written anew"
        assert again.content(path, 21, 5.0) is None
    assert again.knows("concepts/c6/record.json")
    assert not again.knows("concepts/c7/record.json")


def test_a_copy_that_would_be_the_same_is_not_stored_again(store: RunStore, s3_memory: S3Memory) -> None:
    for count in (3, 3, 2):
        s3_memory.requests.clear()
        cache = RecordCache(store)
        for path, content in contents(count):
            cache.keep(path, len(content), 5.0, content)
        stored_before = f"catalog/out/{PATH}" in s3_memory.objects
        cache.store()
        assert s3_memory.requests["put"] == int(count == 2 or not stored_before)


def test_a_damaged_copy_is_ignored(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put(PATH, b"PAR1 is not enough")
    assert not RecordCache(store).knows("concepts/c0/record.json")
    assert "records.parquet is ignored, as it cannot be read" in caplog.text


def test_the_records_are_not_held_in_memory(store: RunStore) -> None:
    count, size = 20_000, 2_000
    cache = RecordCache(store)
    before = pa.total_allocated_bytes()
    for path, content in contents(count, size):
        cache.keep(path, size, 5.0, content)
    assert pa.total_allocated_bytes() - before < count * size / 4
    cache.store()
    del cache
    before = pa.total_allocated_bytes()
    again = RecordCache(store)
    assert all(again.content(path, size, 5.0) == content for path, content in contents(count, size))
    assert pa.total_allocated_bytes() - before < count * size / 4


def test_a_local_disk_needs_no_copy(tmp_path: Path) -> None:
    cache = RecordCache(RunStore(str(tmp_path)))
    cache.keep("concepts/c0/record.json", 1, 5.0, b"x")
    cache.store()
    assert list(tmp_path.iterdir()) == []
