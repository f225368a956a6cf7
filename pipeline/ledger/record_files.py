"""The files that records describe, as parts state them (`record_parts.py`): with them, a plan compares a million
records with a listing as whole columns, and neither reads nor parses their contents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ledger.key_index import KeyIndex, as_words
from pipeline.ledger.listing import ConceptListing, Entry
from pipeline.ledger.record_parts import DESCRIPTIONS, WORDS, read_parts
from pipeline.store.storage import ConceptFolder, RunStore


class RecordFiles:
    """Files of records by the identities of the records' objects (`record_parts.identity`); empty on local disks. A
    record of four files takes some 130 bytes of memory."""

    def __init__(self, store: RunStore) -> None:
        """Read all parts."""
        self._kept: dict[int, bytes] = {}
        """Row -> fingerprint whose files the record describes, where it is not the record's own."""
        self._numbers: dict[str, int] = {}
        """Name of a file -> its number."""
        identities, counts, names, sizes = [], [], [], []
        num_rows = 0
        for _, batches in read_parts(store, DESCRIPTIONS):
            for batch in batches:
                kept = enumerate(batch["kept"].to_pylist(), num_rows)
                self._kept |= {row: fingerprint.encode() for row, fingerprint in kept if fingerprint}
                num_rows += batch.num_rows
                identities.append(b"".join(batch["identity"].to_pylist()))
                counts.append(batch["files"].value_lengths().fill_null(-1).to_numpy())
                files = batch["files"].flatten()
                names.append(self._name_numbers(files.field("name")))
                sizes.append(files.field("bytes").to_numpy())
        num_files = np.concatenate([np.zeros(0, np.int64), *counts])
        self._is_described = num_files >= 0
        self._ends = np.concatenate([[0], np.cumsum(num_files.clip(0))])
        """Ends of the records' files in the columns below, by row and with a 0 in front."""
        self._names = np.concatenate([np.zeros(0, np.int32), *names])
        self._sizes = np.concatenate([np.zeros(0, np.int64), *sizes])
        self._index = KeyIndex(as_words(b"".join(identities), WORDS))

    def knows(self, identities: Sequence[bytes]) -> list[bool]:
        """Return for each identity whether there is a record of its path, whatever its content was."""
        known = iter(self._index.has_first(as_words(b"".join(identities), WORDS)).tolist())
        return [bool(each) and next(known) for each in identities]

    def damages(self, listing: ConceptListing, entries: Sequence[Entry]) -> list[str | None]:
        """Return for each record the damage of its files (`ConceptListing.damage`); None where no part has the
        record."""
        rows = self._rows([entry.identity for entry in entries])
        begins = self._ends[rows]
        counts = np.where(rows >= 0, self._ends[rows + 1] - begins, 0)
        keys = [self._kept.get(row, entry.key) for row, entry in zip(rows.tolist(), entries, strict=True)]
        of = np.repeat(np.arange(len(rows)), counts)
        files = np.arange(len(of)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        found = listing.sizes(keys, list(self._numbers), of, self._names[files])
        damages = [None if row < 0 else "" for row in rows.tolist()]
        for place in np.unique(of[found != self._sizes[files]]).tolist():
            folder = ConceptFolder(entries[place].concept_id, keys[place].decode())
            damages[place] = listing.damage(folder, self._described(int(rows[place])))
        return damages

    def _rows(self, identities: Sequence[bytes]) -> NDArray[np.int64]:
        """Return the row of each record, [n]; -1 where there is none, or one that describes nothing."""
        rows = np.full(len(identities), -1, np.int64)
        has_identity = np.array([bool(each) for each in identities], np.bool_)
        rows[has_identity] = self._index.find(as_words(b"".join(identities), WORDS))
        rows[rows >= 0] = np.where(self._is_described[rows[rows >= 0]], rows[rows >= 0], -1)
        return rows

    def _described(self, row: int) -> dict[str, int]:
        """Return name -> bytes of the files that a record describes."""
        names = list(self._numbers)
        of = slice(self._ends[row], self._ends[row + 1])
        return {
            names[name]: size for name, size in zip(self._names[of].tolist(), self._sizes[of].tolist(), strict=True)
        }

    def _name_numbers(self, names: pa.Array) -> NDArray[np.int32]:
        """Return the number of each name, [n]; a new name gets the next one."""
        coded = names.dictionary_encode()
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in coded.dictionary.to_pylist()]
        found: NDArray[np.int32] = np.array(numbers, np.int32)[coded.indices.to_numpy()]
        return found
