"""The copies of records: what is kept is found again, stale rows go, and the memory stays empty."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.ledger import record_cache, record_parts
from pipeline.ledger.record_cache import RecordCache
from pipeline.ledger.record_parts import FOLDER, PartWriter, identity
from pipeline.store.storage import RunStore
from tests.pipeline.s3_memory import S3Memory


@pytest.fixture
def store(s3_memory: S3Memory) -> RunStore:
    assert s3_memory.objects is not None
    return RunStore("s3://catalog/out")


def contents(count: int, size: int = 20, version: str = "v") -> Iterator[tuple[bytes, bytes]]:
    """Yield identity and content of records."""
    random_bytes = random.Random(0).randbytes
    for number in range(count):
        yield identity(f"concepts/c{number}/f/record.json", size, version), random_bytes(size)


def keep(store: RunStore, records: Iterator[tuple[bytes, bytes]]) -> None:
    """Do what a report does: look the records up, and add those that are not there."""
    cache = RecordCache(store)
    keys, given = zip(*records, strict=True)
    for key, content, found in zip(keys, given, cache.contents(keys), strict=True):
        if found is None:
            cache.keep(key, content)
    cache.store()


def test_what_was_kept_is_found_until_it_changes(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_parts, "PART_ROWS", 3)
    first = next(contents(1))[0]
    assert RecordCache(store).contents([first, b""]) == [None, None]
    keep(store, contents(7))
    again = RecordCache(store)
    keys, expected = zip(*contents(7), strict=True)
    assert again.contents(keys) == list(expected)
    assert again.contents([keys[3], b"", keys[1]]) == [expected[3], None, expected[1]]
    changed = [key for key, _ in contents(7, version="w")] + [key for key, _ in contents(1, size=21)]
    assert again.contents(changed) == [None] * 8


def test_nothing_is_stored_again(store: RunStore, s3_memory: S3Memory) -> None:
    for count, puts in ((3, 1), (3, 0), (2, 0), (4, 1)):
        s3_memory.requests.clear()
        keep(store, contents(count))
        assert s3_memory.requests["put"] == puts


def test_rows_of_objects_that_are_gone_are_removed(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_cache, "PART_ROWS", 5)
    for version in "abcd":
        keep(store, contents(10, version=version))
        assert None not in RecordCache(store).contents([key for key, _ in contents(10, version=version)])
    cache = RecordCache(store)
    assert cache.contents([key for key, _ in contents(10, version="a")]) == [None] * 10


def test_many_small_parts_become_few(store: RunStore) -> None:
    for number in range(30):
        keep(store, contents(number + 1))
        assert len(store.list(FOLDER)) <= 22
    keys, expected = zip(*contents(30), strict=True)
    assert RecordCache(store).contents(keys) == list(expected)


def test_parts_stay_while_new_ones_cannot_be_stored(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, content in contents(30):
        parts = PartWriter(store)
        parts.add(key, content)
        parts.flush()
    cache = RecordCache(store)
    keys, expected = zip(*contents(30), strict=True)
    cache.contents(keys)

    def fail(*_: object) -> None:
        raise PermissionError("no right to put")

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "put", fail)
        cache.store()
    assert RecordCache(store).contents(keys) == list(expected)


def test_the_records_are_not_held_in_memory(store: RunStore) -> None:
    count, size = 20_000, 2_000
    before = pa.total_allocated_bytes()
    keep(store, contents(count, size))
    assert pa.total_allocated_bytes() - before < count * size / 4
    before = pa.total_allocated_bytes()
    again = RecordCache(store)
    keys, expected = zip(*contents(count, size), strict=True)
    for start in range(0, count, 500):
        assert again.contents(keys[start : start + 500]) == list(expected[start : start + 500])
    assert pa.total_allocated_bytes() - before < count * size / 4


def test_a_local_disk_needs_no_copy(tmp_path: Path) -> None:
    cache = RecordCache(RunStore(str(tmp_path)))
    cache.keep(next(contents(1))[0], b"x")
    cache.store()
    assert list(tmp_path.iterdir()) == []
