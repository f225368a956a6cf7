"""Parts of records: when they are stored, and which of them are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.ledger import record_parts
from pipeline.ledger.record_parts import CONTENTS, FOLDER, PartWriter, identity, read_parts
from pipeline.store.storage import RunStore
from tests.pipeline.s3_memory import S3Memory


@pytest.fixture
def store(s3_memory: S3Memory) -> RunStore:
    assert s3_memory.objects is not None
    return RunStore("s3://catalog/out")


def contents(store: RunStore) -> list[list[bytes]]:
    """Return the contents in each part."""
    return [
        [each for batch in batches for each in batch["content"].to_pylist()]
        for _, batches in read_parts(store, CONTENTS)
    ]


def test_a_part_is_stored_when_it_is_full_when_it_is_old_and_at_the_end(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_parts, "PART_ROWS", 3)
    now = 0.0
    monkeypatch.setattr(record_parts.time, "monotonic", lambda: now)
    parts = PartWriter(store)
    for number in range(5):
        parts.add_content(f"concepts/c{number}/f/record.json", b"%d" % number)
    assert contents(store) == [[b"0", b"1", b"2"]]
    now = 1000.0
    parts.add_content("concepts/c5/f/record.json", b"5")
    assert contents(store) == [[b"0", b"1", b"2"], [b"3", b"4", b"5"]]
    parts.add_content("concepts/c6/f/record.json", b"6")
    now = 2000.0
    parts.add_content("concepts/c7/f/record.json", b"7")
    assert contents(store)[2:] == [[b"6", b"7"]]
    parts.flush()
    parts.add_content("concepts/c8/f/record.json", b"8")
    parts.flush()
    assert contents(store)[3:] == [[b"8"]]
    assert parts.is_whole


def test_an_identity_changes_with_path_size_and_version() -> None:
    one = identity("concepts/a/f/record.json", 10, "v1")
    assert len(one) == 24
    others = [
        identity("concepts/b/f/record.json", 10, "v1"),
        identity("concepts/a/f/record.json", 11, "v1"),
        identity("concepts/a/f/record.json", 10, "v2"),
    ]
    assert len({one, *others}) == 4
    assert [each[:8] == one[:8] for each in others] == [False, True, True]
    assert identity("concepts/a/f/record.json", 10, "") == b""


def test_the_version_that_a_listing_tells_of_an_object_is_that_of_its_content(store: RunStore) -> None:
    store.put("concepts/a/f/record.json", b"content")
    (found,) = store.scan_objects("concepts")
    assert found.version == hashlib.md5(b"content").hexdigest()


@pytest.mark.parametrize("way", ["cut", "changed", "no table"])
def test_a_damaged_part_is_left_out(way: str, store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        parts = PartWriter(store)
        parts.add_content(f"concepts/c{number}/f/record.json", b"%d" % number)
        parts.flush()
    first = min(store.list(FOLDER))
    whole = store.get(first)
    if way == "no table":
        store.delete(first)
        store.put(f"{FOLDER}/0-{hashlib.md5(b'text').hexdigest()}.parquet", b"text")
    else:
        store.put(first, whole[:-9] if way == "cut" else whole.replace(b"0", b"1", 1))
    assert contents(store) == [[b"1"]]
    assert "is ignored, as it cannot be read" in caplog.text


def test_a_part_that_cannot_be_stored_is_told(
    store: RunStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("no right to put")

    monkeypatch.setattr(RunStore, "put", fail)
    parts = PartWriter(store)
    parts.add_content("concepts/c/f/record.json", b"x")
    parts.flush()
    assert not parts.is_whole
    assert "was not stored: no right to put" in caplog.text


def test_a_local_disk_needs_no_parts(tmp_path: Path) -> None:
    parts = PartWriter(RunStore(str(tmp_path)))
    assert not parts.is_needed
    parts.add_content("concepts/c/f/record.json", b"x")
    parts.flush()
    assert list(tmp_path.iterdir()) == []
    assert list(read_parts(RunStore(str(tmp_path)), CONTENTS)) == []
