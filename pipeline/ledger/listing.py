"""The objects of all concepts of an output, as one listing shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from pipeline.store.storage import ConceptFolder


class SizedFile(Protocol):
    """A file of a concept as its record describes it."""

    @property
    def bytes(self) -> int: ...


class Entry(NamedTuple):
    """A record or failure in a listing."""

    folder: ConceptFolder
    path: str
    num_bytes: int
    written_at: float
    """Time of writing by the store's clock, in seconds since 1970; 0 where the store tells none."""


class ConceptListing:
    """Records, failures and sizes of files under `concepts/`. A concept takes some hundred bytes of memory."""

    def __init__(self, objects: Iterable[tuple[str, int, float]]) -> None:
        """Take in the (path, bytes, time of writing) of `RunStore.scan_with_times("concepts")`.

        An empty record does not count: its store has lost the content.
        """
        self.records: dict[bytes, Entry] = {}
        """Fingerprint -> record."""
        self.failures: dict[bytes, Entry] = {}
        """Fingerprint -> failure."""
        self.awaiting_retry: dict[str, str] = {}
        """Concept id -> fingerprint of each concept below the gate whose retries have not ended."""
        self._sizes: dict[bytes, dict[str, int]] = {}
        for path, size, written_at in objects:
            folder = ConceptFolder.from_path(path)
            if folder is None:
                continue
            key = folder.fingerprint.encode()
            if path == folder.record:
                if size:
                    self.records[key] = Entry(folder, path, size, written_at)
            elif path == folder.failure:
                self.failures[key] = Entry(folder, path, size, written_at)
            elif path == folder.ladder:
                self.awaiting_retry[folder.concept_id] = folder.fingerprint
            else:
                self._sizes.setdefault(key, {})[sys.intern(path.rpartition("/")[2])] = size

    def damage(self, folder: ConceptFolder, files: Mapping[str, SizedFile]) -> str:
        """Return which of the files in a folder is missing or has another size than its record says; empty if all are
        as described."""
        sizes = self._sizes.get(folder.fingerprint.encode(), {})
        for name, file in files.items():
            if name not in sizes:
                return f"{folder.file(name)} is missing"
            if sizes[name] != file.bytes:
                return f"{folder.file(name)} has {sizes[name]:,} bytes and not the {file.bytes:,} of its record"
        return ""
