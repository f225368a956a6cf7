"""The objects of all concepts of an output, as one listing shows them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.ledger.record_parts import identity
from pipeline.store.storage import FAILURE, LADDER, RECORD, ConceptFolder, RunStore, StoredObject

_NAME_BITS = 16
"""Bits of a file's name, as a number, in its key; the number of its folder is above them."""

_NOWHERE = -1
"""Number of a folder or name that the listing does not show."""


class Entry(NamedTuple):
    """A record or failure in a listing."""

    concept_id: str
    key: bytes
    """The fingerprint, in ASCII."""
    name: str
    """Name of the object in the concept's folder."""
    identity: bytes
    """Identity of the object (`record_parts.identity`); empty where the store tells none."""

    @property
    def fingerprint(self) -> str:
        return self.key.decode()

    @property
    def path(self) -> str:
        return ConceptFolder(self.concept_id, self.fingerprint).file(self.name)


class ConceptListing:
    """Records, failures and sizes of files under `concepts/`. A concept takes less than 1 KB of memory."""

    def __init__(self, objects: Iterable[StoredObject] = ()) -> None:
        """Take in some objects."""
        self.records: dict[bytes, Entry] = {}
        """Fingerprint -> record."""
        self.failures: dict[bytes, Entry] = {}
        """Fingerprint -> failure."""
        self.awaiting_retry: dict[str, str] = {}
        """Fingerprint -> concept id of each concept below the gate whose retries have not ended."""
        self._folders: dict[bytes, int] = {}
        """Fingerprint -> number of its folder."""
        self._names: dict[str, int] = {}
        """Name of a file -> its number."""
        self._files = array("q")
        """Key of each file that is neither record, failure nor ladder: the numbers of folder and name."""
        self._sizes = array("q")
        """Bytes of each of these files."""
        self._is_sorted = True
        for each in objects:
            self.add(each)

    @classmethod
    def of(cls, store: RunStore) -> ConceptListing:
        """List the concepts of an output."""
        listing = cls()
        for page in store.scan_pages("concepts"):
            listing.add_all(page.paths, page.sizes, page.versions)
        return listing

    def add(self, found: StoredObject) -> None:
        """Take in one object."""
        self.add_all([found.path], [found.num_bytes], [found.version])

    def add_all(self, paths: Sequence[str], sizes: Sequence[int], versions: Sequence[str]) -> None:
        """Take in objects, given by the columns of a `StoredPage`. An empty record does not count: its store has lost
        the content."""
        folder, concept_id, key, number = "", "", b"", _NOWHERE
        for path, size, version in zip(paths, sizes, versions, strict=True):
            place, _, name = path.rpartition("/")
            if place != folder:  # those of a folder mostly follow each other
                folder = place
                concept_id, key = _concept_of(folder)
                number = self._folders.setdefault(key, len(self._folders)) if key else _NOWHERE
            if number == _NOWHERE:
                continue
            if name == RECORD:
                if size:
                    self.records[key] = Entry(concept_id, key, RECORD, identity(path, size, version))
            elif name == FAILURE:
                self.failures[key] = Entry(concept_id, key, FAILURE, identity(path, size, version))
            elif name == LADDER:
                self.awaiting_retry[key.decode()] = concept_id
            else:
                name_number = self._names.setdefault(name, len(self._names))
                if name_number < 2**_NAME_BITS:
                    self._files.append(number << _NAME_BITS | name_number)
                    self._sizes.append(size)
        self._is_sorted = False

    def damage(self, folder: ConceptFolder, sizes: Mapping[str, int]) -> str:
        """Return which of the files in a folder is missing or has another size than its record says; empty if all are
        as described.

        sizes: the bytes of each file, by name.
        """
        self._sort()
        number = self._folders.get(folder.fingerprint.encode(), _NOWHERE)
        for name, size in sizes.items():
            file = number << _NAME_BITS | self._names.get(name, _NOWHERE)
            place = bisect_right(self._files, file) - 1
            if place < 0 or self._files[place] != file:
                return f"{folder.file(name)} is missing"
            if self._sizes[place] != size:
                return f"{folder.file(name)} has {self._sizes[place]:,} bytes and not the {size:,} of its record"
        return ""

    def sizes(
        self, keys: Sequence[bytes], names: Sequence[str], folders: NDArray[np.int64], files: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Return the bytes of files in the folders of fingerprints, [n]; -1 where there is no such file.

        folders, files: [n], the places in `keys` and in `names` of each file's fingerprint and name.
        """
        self._sort()
        numbers = np.array([self._folders.get(key, _NOWHERE) for key in keys], np.int64)[folders]
        name_numbers = np.array([self._names.get(name, _NOWHERE) for name in names], np.int64)[files]
        wanted = numbers << _NAME_BITS | name_numbers
        present = np.frombuffer(self._files, np.int64)
        place = np.searchsorted(present, wanted, "right") - 1
        found = np.full(len(wanted), -1, np.int64)
        is_there = place >= 0
        is_there[is_there] = present[place[is_there]] == wanted[is_there]
        found[is_there] = np.frombuffer(self._sizes, np.int64)[place[is_there]]
        return found

    def _sort(self) -> None:
        """Order the files by their keys; of two with the same key, the later one is found."""
        if self._is_sorted:
            return
        files, sizes = np.frombuffer(self._files, np.int64), np.frombuffer(self._sizes, np.int64)
        order = np.argsort(files, kind="stable")
        files[:] = files[order]  # in place: they are the largest columns
        sizes[:] = sizes[order]
        self._is_sorted = True


def _concept_of(folder: str) -> tuple[str, bytes]:
    """Return concept id and fingerprint of a concept's folder; both empty for other folders."""
    parts = folder.split("/")
    return (parts[1], parts[2].encode()) if len(parts) == 3 and parts[0] == "concepts" else ("", b"")
