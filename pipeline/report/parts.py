"""The parts of a large report: `report/<digest>/*.js`, which the page loads when it needs them.

A part is a script that calls one function with JSON: a page on a local disk may load scripts, and nothing else. Each
report has a folder of its own, so that a page that is open goes on finding its parts until the next one is in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.report.html import to_script
from pipeline.store.storage import RunStore

ROOT = "report"
"""Folder of the parts of all reports."""

ROWS_PER_PART = 5000
DETAILS_PER_PART = 100

_THREADS = 8


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes the parts of one report."""

    store: RunStore
    name: str
    """Name of the report's folder."""

    @classmethod
    def of(cls, store: RunStore, made_at: str) -> PartWriter:
        """Return the writer for a report made at this moment."""
        return cls(store, hashlib.sha256(f"{store.root} {made_at}".encode()).hexdigest()[:12])

    @property
    def folder(self) -> str:
        return f"{ROOT}/{self.name}"

    def put_all(self, kind: str, values: Iterator[Any], per_part: int) -> None:
        """Write values in parts of `per_part` each; some parts at a time are in memory."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="report") as pool:
            parts = iter(lambda: list(islice(values, per_part)), [])
            number = 0
            while batch := list(islice(parts, _THREADS)):
                list(pool.map(lambda numbered: self._put(kind, *numbered), enumerate(batch, number)))
                number += len(batch)

    def delete_others(self) -> None:
        """Delete the parts of all other reports."""
        for path in self.store.list(ROOT):
            if not path.startswith(f"{self.folder}/"):
                self.store.delete(path)

    def _put(self, kind: str, number: int, values: list[Any]) -> None:
        text = f'reportPart("{kind}", {number}, {to_script(values)});\n'
        self.store.put(f"{self.folder}/{kind}-{number:05d}.js", text.encode())
