from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store.parquet import iter_batches, read_table, read_tables

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", None], "c": [[1.0], [], [2.0, 3.0]]})


def parquet_bytes(table: pa.Table = TABLE) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_reads_a_path_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(parquet_bytes())
    assert read_table(tmp_path / "t.parquet").equals(TABLE)
    assert read_table(io.BytesIO(parquet_bytes())).equals(TABLE)


def test_columns_come_in_the_order_asked_for() -> None:
    assert read_table(io.BytesIO(parquet_bytes()), ["b", "a"]).equals(TABLE.select(["b", "a"]))


def test_a_missing_column_is_an_error_and_named() -> None:
    with pytest.raises(pa.ArrowInvalid, match="'d'"):
        read_table(io.BytesIO(parquet_bytes()), ["a", "d"])


def test_damaged_bytes_are_an_error() -> None:
    for data in (b"", b"no parquet", parquet_bytes()[:-20]):
        with pytest.raises(pa.ArrowInvalid):
            read_table(io.BytesIO(data))


def test_reads_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(parquet_bytes(TABLE.slice(1)))
    (tmp_path / "0.parquet").write_bytes(parquet_bytes(TABLE.slice(0, 1)))
    assert read_tables(tmp_path).equals(TABLE)


def test_batches_hold_all_rows() -> None:
    batches = list(iter_batches(io.BytesIO(parquet_bytes()), ["a"], batch_rows=2))
    assert [batch.to_pylist() for batch in batches] == [[{"a": 1}, {"a": 2}], [{"a": 3}]]


def test_reading_starts_no_thread_of_pyarrow(tmp_path: Path) -> None:
    """A thread that still holds a Python file when the interpreter ends aborts the process."""
    (tmp_path / "t.parquet").write_bytes(parquet_bytes())
    script = (
        "import io, os, sys\n"
        "from pipeline.store.parquet import iter_batches, read_table\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "read_table(io.BytesIO(data), ['a', 'b'])\n"
        "list(iter_batches(io.BytesIO(data)))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "t.parquet")]
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"
