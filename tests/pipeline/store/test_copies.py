"""Copies kept for speed: nothing fails without them."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store.copies import put_copy, read_copy
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.s3_memory import S3Memory

TABLE = pa.table({"name": ["a", "b"]})


def parse(content: bytes) -> pa.Table:
    return read_table(io.BytesIO(content), ["name"])


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer)
    return buffer.getvalue()


@pytest.mark.usefixtures("s3_memory")
def test_a_copy_is_read_where_it_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    store = RunStore("s3://catalog/out")
    assert read_copy(store, "copy.parquet", parse) is None
    put_copy(store, "copy.parquet", as_parquet())
    assert read_copy(store, "copy.parquet", parse) == TABLE
    assert not caplog.records
    put_copy(store, "copy.parquet", as_parquet()[:-9])
    assert read_copy(store, "copy.parquet", parse) is None
    assert "copy.parquet is ignored, as it cannot be read" in caplog.text


def test_a_copy_that_cannot_be_stored_is_told(
    s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(RunStore, "put", refuse)
    put_copy(RunStore("s3://catalog/out"), "copy.parquet", b"")
    assert "copy.parquet was not stored: read only" in caplog.text
    assert not s3_memory.objects


def test_a_local_disk_needs_none(tmp_path: Path) -> None:
    (tmp_path / "copy.parquet").write_bytes(as_parquet())
    assert read_copy(RunStore(str(tmp_path)), "copy.parquet", parse) is None
