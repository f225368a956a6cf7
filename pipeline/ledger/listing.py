"""The objects of all concepts of an output, as one listing shows them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.ledger.record_parts import identity
from pipeline.store.storage import FAILURE, LADDER, RECORD, ConceptFolder, StoredObject

_NAME_BITS = 16
"""Bits of a file's name, as a number, below its size in 8 bytes."""


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
        """Take in the objects of `RunStore.scan_objects("concepts")`."""
        self.records: dict[bytes, Entry] = {}
        """Fingerprint -> record."""
        self.failures: dict[bytes, Entry] = {}
        """Fingerprint -> failure."""
        self.awaiting_retry: dict[str, str] = {}
        """Fingerprint -> concept id of each concept below the gate whose retries have not ended."""
        self._sizes: dict[bytes, bytes] = {}
        """Fingerprint -> sizes of its other files: 8 bytes for each, with the number of the name in the lowest."""
        self._numbers: dict[str, int] = {}
        """Name of a file -> its number."""
        for each in objects:
            self.add(each)

    def add(self, found: StoredObject) -> None:
        """Take in one object. An empty record does not count: its store has lost the content."""
        path, size = found.path, found.num_bytes
        folders = path.split("/")
        if len(folders) != 4 or folders[0] != "concepts":
            return
        _, concept_id, fingerprint, name = folders
        key = fingerprint.encode()
        if name == RECORD:
            if size:
                self.records[key] = Entry(concept_id, key, RECORD, identity(path, size, found.version))
        elif name == FAILURE:
            self.failures[key] = Entry(concept_id, key, FAILURE, identity(path, size, found.version))
        elif name == LADDER:
            self.awaiting_retry[fingerprint] = concept_id
        else:
            number = self._numbers.setdefault(name, len(self._numbers))
            if number < 2**_NAME_BITS:
                self._sizes[key] = self._sizes.get(key, b"") + (size << _NAME_BITS | number).to_bytes(8, "little")

    def damage(self, folder: ConceptFolder, sizes: Mapping[str, int]) -> str:
        """Return which of the files in a folder is missing or has another size than its record says; empty if all are
        as described.

        sizes: the bytes of each file, by name.
        """
        packed = self._sizes.get(folder.fingerprint.encode(), b"")
        words = struct.unpack(f"<{len(packed) // 8}Q", packed)
        found = {word % 2**_NAME_BITS: word >> _NAME_BITS for word in words}
        for name, size in sizes.items():
            number = self._numbers.get(name)
            if number not in found:
                return f"{folder.file(name)} is missing"
            if found[number] != size:
                return f"{folder.file(name)} has {found[number]:,} bytes and not the {size:,} of its record"
        return ""
