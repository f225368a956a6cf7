"""The contents of records as parts hold them (`record_parts.py`): with them, resuming on an object store does not read
each record.

The contents lie in a temporary file, and what is in memory takes some 70 bytes a record.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence

import numpy as np

from pipeline.ledger.key_index import KeyIndex, Words, as_words
from pipeline.ledger.record_parts import CONTENTS, PART_ROWS, WORDS, PartWriter, read_parts
from pipeline.store.storage import RunStore

_FEW_PARTS = 20


class RecordCache:
    """Contents of records by the identities of their objects (`record_parts.identity`); empty on local disks."""

    def __init__(self, store: RunStore) -> None:
        """Read all parts."""
        self._store = store
        self._parts: list[str] = []
        self._contents = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this
        self._ends = array("Q", [0])
        """Ends of the contents in the file, by row and with a 0 in front."""
        identities = []
        for path, batches in read_parts(store, CONTENTS):
            self._parts.append(path)
            for batch in batches:
                identities += batch["identity"].to_pylist()
                self._append(batch["content"].to_pylist())
        self._contents.flush()
        self._identities = as_words(b"".join(identities), WORDS)
        self._index = KeyIndex(self._identities)
        self._is_used = np.zeros(len(identities), np.bool_)
        self._added = PartWriter(store)
        self._num_added = 0

    def contents(self, identities: Sequence[bytes]) -> list[bytes | None]:
        """Return the content of each object; None where there is none."""
        rows = self._index.find(_as_words(identities))
        self._is_used[rows[rows >= 0]] = True
        found = iter(rows.tolist())
        return [self._content(next(found)) if each else None for each in identities]

    def keep(self, identity: bytes, content: bytes) -> None:
        """Add a record that `contents` did not have to the parts; `store` writes the last of them."""
        self._added.add(identity, content)
        self._num_added += bool(identity)

    def store(self) -> None:
        """Store what was added. If most rows are of objects that are no longer there, or the parts are many small ones,
        write those that were asked for anew, and delete the parts that were read."""
        self._added.flush()
        num_used = int(self._is_used.sum())
        few = _FEW_PARTS + 2 * num_used // PART_ROWS
        if len(self._parts) <= few and len(self._is_used) <= 2 * num_used + PART_ROWS:
            return
        anew = PartWriter(self._store)
        for row in np.flatnonzero(self._is_used).tolist():
            anew.add(self._identities[row].tobytes(), self._content(row) or b"")
        anew.flush()
        for path in self._parts if anew.is_whole else ():
            self._store.delete(path)

    def _append(self, contents: Sequence[bytes]) -> None:
        for content in contents:
            self._contents.write(content)
            self._ends.append(self._ends[-1] + len(content))

    def _content(self, row: int) -> bytes | None:
        if row < 0:
            return None
        begin = self._ends[row]
        return os.pread(self._contents.fileno(), self._ends[row + 1] - begin, begin)


def _as_words(identities: Sequence[bytes]) -> Words:
    """Return the identities that are not empty, [n, words]."""
    return as_words(b"".join(identities), WORDS)
