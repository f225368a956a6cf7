"""Copies of many records in one object, `records/*.parquet`, kept on object stores: each saves a request for a record.

The driver writes parts while concepts end, as it has their records in hand; the report adds what no part has. The
record of each concept stays the truth: a row of a part is used only for the very object whose identity it has
(`identity`). What a plan needs of a record, the sizes of its files, has columns of its own, so that a million contents
need not be parsed. The name of a part states the MD5 of its bytes, so that one that was damaged is left out. Parts may
be deleted.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json as from_json_text

from pipeline.store.copies import put_copy
from pipeline.store.parquet import iter_batches
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

FOLDER = "records"
PART_ROWS = 5000
"""Largest number of records in a part."""
WORDS = 3
"""Length of an identity, in words of 8 bytes."""

CONTENTS = ("identity", "content")
DESCRIPTIONS = ("identity", "kept", "files")
"""Columns that say which files the records describe: those of the fingerprint `kept` if it is not empty. `files` is
null for a content that is no record."""

_FILE = pa.struct([("name", pa.string()), ("bytes", pa.int64())])
_SCHEMA = pa.schema(
    [("identity", pa.binary(8 * WORDS)), ("content", pa.binary()), ("kept", pa.string()), ("files", pa.list_(_FILE))]
)
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
        identities, contents = zip(*self._waiting, strict=True)
        self._waiting.clear()
        columns = [pa.array(identities, _SCHEMA.field("identity").type), pa.array(contents, pa.binary())]
        buffer = io.BytesIO()
        pq.write_table(pa.table([*columns, *_descriptions(contents)], _SCHEMA), buffer, compression="zstd")
        content = buffer.getvalue()
        name = f"{time.time_ns():020d}-{hashlib.md5(content, usedforsecurity=False).hexdigest()}"
        self.is_whole &= put_copy(self._store, f"{FOLDER}/{name}.parquet", content)


def read_parts(store: RunStore, columns: Sequence[str]) -> Iterator[tuple[str, list[pa.RecordBatch]]]:
    """Yield path and rows of every part that is whole, the oldest first; `columns` are CONTENTS or DESCRIPTIONS."""
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
                yield path, _rows(content, columns)
            except (pa.ArrowException, OSError) as error:
                log.warning("%s is ignored, as it cannot be read: %s", store.uri(path), error)


def _rows(part: bytes, columns: Sequence[str]) -> list[pa.RecordBatch]:
    """Read columns of a part; parts of earlier releases describe no files, which the contents then tell."""
    batches = list(iter_batches(io.BytesIO(part), columns))
    if all(set(columns) <= set(batch.schema.names) for batch in batches):
        return batches
    return [
        pa.record_batch([batch["identity"], *_descriptions(batch["content"].to_pylist())], list(DESCRIPTIONS))
        for batch in iter_batches(io.BytesIO(part), CONTENTS)
    ]


def _descriptions(contents: Sequence[bytes]) -> tuple[pa.Array, pa.Array]:
    """Return the columns `kept` and `files` of records."""
    kept: list[str] = []
    begins: list[int | None] = []
    names: list[str] = []
    sizes: list[int] = []
    for content in contents:
        record = _parse(content)
        kept.append(record.get("kept", ""))
        begins.append(len(names) if record else None)
        for name, file in record.get("files", {}).items():
            names.append(name)
            sizes.append(file["bytes"])
    files = pa.StructArray.from_arrays([pa.array(names, pa.string()), pa.array(sizes, pa.int64())], fields=list(_FILE))
    return pa.array(kept, pa.string()), pa.ListArray.from_arrays(pa.array([*begins, len(names)], pa.int32()), files)


def _parse(content: bytes) -> dict[str, Any]:
    """Return the fields of a record; none of a content that is no record."""
    try:
        tree = from_json_text(content)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
