"""A copy of all records in one object, `records.parquet`: with it, resuming on an object store does not read each.

The copy that is read and the one that is made lie in temporary files, so that a million records take little memory.
"""

from __future__ import annotations

import io
import tempfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.copies import put_copy, read_copy
from pipeline.store.parquet import iter_batches
from pipeline.store.storage import RunStore

PATH = "records.parquet"

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("written", pa.float64()), ("content", pa.binary())])
_BATCH = 5000


class RecordCache:
    """A copy of all records in one object, `records.parquet`; unused on local disks, where a request costs nothing."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._table = pa.Table.from_batches([], _SCHEMA)  # empty_table() would import pandas
        self._rows: dict[str, int] = {}
        """Path of a record -> its row in the table."""
        self._next = _NextCopy()
        self._is_changed = False
        if (stored := read_copy(store, PATH, _mapped)) is not None:
            self._table = stored
            self._rows = {path: row for row, path in enumerate(stored["path"].to_pylist())}

    def knows(self, path: str) -> bool:
        """Return whether the copy has an object of this path, whatever its content was."""
        return path in self._rows

    def content(self, path: str, size: int, written: float) -> bytes | None:
        """Return the cached content of an object; None unless its size and time of writing are those of the listing."""
        row = self._rows.get(path)
        if row is None or not written:
            return None
        if (self._table["size"][row].as_py(), self._table["written"][row].as_py()) != (size, written):
            return None
        content: bytes = self._table["content"][row].as_py()
        return content

    def keep(self, path: str, size: int, written: float, content: bytes) -> None:
        """Add an object to the copy that `store` writes."""
        self._is_changed |= self.content(path, size, written) is None
        if self._store.is_remote and written:
            self._next.add({"path": path, "size": size, "written": written, "content": content})

    def store(self) -> None:
        """Replace the stored copy by the kept objects, if they differ."""
        if self._next.num_rows and (self._is_changed or self._next.num_rows != len(self._rows)):
            put_copy(self._store, PATH, self._next.finish())


class _NextCopy:
    """A copy that is being made, in a temporary file."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._waiting: list[dict[str, Any]] = []
        self._file = tempfile.SpooledTemporaryFile(max_size=2**20)  # noqa: SIM115  # lives as long as this
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.num_rows += 1
        self._waiting.append(row)
        if len(self._waiting) >= _BATCH:
            self._write()

    def finish(self) -> bytes:
        """Return the whole copy as Parquet; nothing can be added any more."""
        self._write().close()
        self._file.seek(0)
        return self._file.read()

    def _write(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, _SCHEMA, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._waiting, _SCHEMA))
        self._waiting.clear()
        return self._writer


def _mapped(content: bytes) -> pa.Table:
    """Return a Parquet file's rows as a table on a temporary file, from which the operating system reads what is looked
    at. Raises pyarrow.ArrowException if it is no such file."""
    with tempfile.NamedTemporaryFile() as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            for batch in iter_batches(io.BytesIO(content), _SCHEMA.names, _BATCH):
                writer.write_table(pa.Table.from_batches([batch]).cast(_SCHEMA))
        file.flush()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()  # the file lives on without its name
