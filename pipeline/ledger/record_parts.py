"""Copies of many records in one object, `records/*.parquet`, kept on object stores: each saves a request for a record.

The driver writes parts while concepts end, as it has their records in hand; the report adds what no part has. The
record of each concept stays the truth: a row of a part is used only for the very object whose identity it has
(`identity`). The name of a part states the MD5 of its bytes, so that one that was damaged is left out. Parts may be
deleted.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.copies import put_copy
from pipeline.store.parquet import iter_batches
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

FOLDER = "records"
PART_ROWS = 5000
"""Largest number of records in a part."""
WORDS = 3
"""Length of an identity, in words of 8 bytes."""

_SCHEMA = pa.schema([("identity", pa.binary(8 * WORDS)), ("content", pa.binary())])
_LONGEST_WAIT_S = 300.0
_READ_AT_A_TIME = 8


def identity(path: str, num_bytes: int, version: str) -> bytes:
    """Return 24 bytes: 8 that tell the paths of objects apart, and 16 that also tell their contents apart.

    `version` is that of a listing (`StoredObject`), or the MD5 of the content, which on S3 is the same unless the store
    encrypts with its owner's keys. A row under an MD5 is then never used where the store's tags are others. Empty for
    an object whose store tells no version: nothing can be said about its content.
    """
    if not version:
        return b""
    place = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return place + hashlib.blake2b(f"{path}\0{num_bytes}\0{version}".encode(), digest_size=16).digest()


class PartWriter:
    """Writes records in parts, each as soon as it is full or five minutes old."""

    def __init__(self, store: RunStore) -> None:
        self.is_needed = store.is_remote
        """False on a local disk, where a request costs nothing and nothing is written."""
        self.is_whole = True
        """False once a part could not be stored."""
        self._store = store
        self._waiting: list[tuple[bytes, bytes]] = []
        self._since = 0.0

    def add(self, identity: bytes, content: bytes) -> None:
        """Add the content of a record, which must be one that `records.from_json` reads."""
        if not self.is_needed or not identity:
            return
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append((identity, content))
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._since >= _LONGEST_WAIT_S:
            self.flush()

    def add_content(self, path: str, content: bytes) -> None:
        """Add the content of a record that was put at `path` a moment ago."""
        self.add(identity(path, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest()), content)

    def flush(self) -> None:
        """Store what waits. A failure is logged: the records are then read one by one."""
        if not self._waiting:
            return
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*self._waiting, strict=True), _SCHEMA, strict=True)
        ]
        self._waiting.clear()
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, _SCHEMA), buffer, compression="zstd")
        content = buffer.getvalue()
        name = f"{time.time_ns():020d}-{hashlib.md5(content, usedforsecurity=False).hexdigest()}"
        self.is_whole &= put_copy(self._store, f"{FOLDER}/{name}.parquet", content)


def read_parts(store: RunStore) -> Iterator[tuple[str, list[pa.RecordBatch]]]:
    """Yield path and rows of every part that is whole, the oldest first; columns: `identity` and `content`."""
    if not store.is_remote:
        return
    paths = sorted(store.list(FOLDER))
    for first in range(0, len(paths), _READ_AT_A_TIME):
        for path, content in store.get_many(paths[first : first + _READ_AT_A_TIME]).items():
            try:
                if isinstance(content, OSError):
                    raise content
                if hashlib.md5(content, usedforsecurity=False).hexdigest() not in path:
                    raise OSError("its content is not what its name states")
                yield path, list(iter_batches(io.BytesIO(content), _SCHEMA.names))
            except (pa.ArrowException, OSError) as error:
                log.warning("%s is ignored, as it cannot be read: %s", store.uri(path), error)
