"""The records' contents in one object: on an object store, reading 10,000 of them is one request, not one each.

It is a copy for speed alone. A record is taken from it only if the listing shows the same size and time of writing;
every other is read itself. It may be deleted at any time.
"""

from __future__ import annotations

import io
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import RunStore

log = logging.getLogger(__name__)

PATH = "records.parquet"

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("written", pa.float64()), ("content", pa.binary())])


class Remembered:
    """What was remembered, and what is to be from now on. Nothing on local disks, where a request costs nothing."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._table, self._rows = store, _SCHEMA.empty_table(), dict[str, int]()
        self._kept: list[dict[str, object]] = []
        self._is_new = False
        if not store.is_remote:
            return
        try:
            self._table = pq.read_table(io.BytesIO(store.get(PATH)), schema=_SCHEMA)
        except FileNotFoundError:
            return
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is read no further: %s", store.uri(PATH), error)
            return
        self._rows = {path: row for row, path in enumerate(self._table["path"].to_pylist())}

    def content(self, path: str, size: int, written: float) -> bytes | None:
        """Of an object as a listing shows it, if this is what was remembered."""
        row = self._rows.get(path)
        if row is None or not written:
            return None
        if (self._table["size"][row].as_py(), self._table["written"][row].as_py()) != (size, written):
            return None
        content: bytes = self._table["content"][row].as_py()
        return content

    def keep(self, path: str, size: int, written: float, content: bytes) -> None:
        """To be remembered by `store`."""
        self._is_new |= self.content(path, size, written) is None
        if self._store.is_remote and written:
            self._kept.append({"path": path, "size": size, "written": written, "content": content})

    def store(self) -> None:
        """Replace what was remembered, if it is another now. Never fails: the next run reads each record again."""
        if not self._kept or not (self._is_new or len(self._kept) != len(self._rows)):
            return
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._kept, _SCHEMA), buffer, compression="zstd")
        try:
            self._store.put(PATH, buffer.getvalue())
        except OSError as error:
            log.warning("%s was not stored: %s", self._store.uri(PATH), error)
