"""A copy of all records in one object, `records.parquet`: with it, resuming on an object store does not read each."""

from __future__ import annotations

import io
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

PATH = "records.parquet"

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("written", pa.float64()), ("content", pa.binary())])


class RecordCache:
    """A copy of all records in one object, `records.parquet`; unused on local disks, where a request costs nothing."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._table = pa.Table.from_batches([], _SCHEMA)  # empty_table() would import pandas
        self._rows: dict[str, int] = {}
        """Path of a record -> its row in the table."""
        self._kept: list[dict[str, object]] = []
        """Rows of the next table."""
        self._is_changed = False
        if not store.is_remote:
            return
        try:
            self._table = read_table(io.BytesIO(store.get(PATH)), _SCHEMA.names).cast(_SCHEMA)
        except FileNotFoundError:
            return
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is ignored, as it cannot be read: %s", store.uri(PATH), error)
            return
        self._rows = {path: row for row, path in enumerate(self._table["path"].to_pylist())}

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
        """Add an object to the table that `store` writes."""
        self._is_changed |= self.content(path, size, written) is None
        if self._store.is_remote and written:
            self._kept.append({"path": path, "size": size, "written": written, "content": content})

    def store(self) -> None:
        """Replace the stored table by the kept rows, if they differ.

        A failure is logged and not raised: without the cache, the next run reads every record by itself.
        """
        if not self._kept or not (self._is_changed or len(self._kept) != len(self._rows)):
            return
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._kept, _SCHEMA), buffer, compression="zstd")
        try:
            self._store.put(PATH, buffer.getvalue())
        except OSError as error:
            log.warning("%s was not stored: %s", self._store.uri(PATH), error)
