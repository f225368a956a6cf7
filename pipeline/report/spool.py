"""The report's rows between reading the records and writing the page: on disk, in the page's order.

The rows are in a temporary database of SQLite, which holds a few megabytes of them in memory, however many there are.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any

_BATCH = 1000

_SCHEMA = """
CREATE TABLE concepts (rank INTEGER, score REAL, concept TEXT, fingerprint TEXT, row TEXT, details TEXT);
CREATE TABLE pictures (concept TEXT, fingerprint TEXT, prompt TEXT, seed INTEGER, path TEXT, error TEXT);
"""
_ORDER = """
CREATE TABLE ordered AS
    SELECT row_number() OVER (ORDER BY rank, score, concept) - 1 AS position, concept, fingerprint, row, details
    FROM concepts;
CREATE UNIQUE INDEX by_position ON ordered (position);
CREATE INDEX by_concept ON pictures (concept, fingerprint);
"""


@dataclass(frozen=True, slots=True)
class DrawnPicture:
    """A bulk picture, or the error that kept it from being drawn."""

    concept_id: str
    fingerprint: str
    """Fingerprint of the result that it was drawn with."""
    prompt: str
    seed: int
    path: str
    """Path in the output; empty if the picture is inside a Parquet part, or was not drawn."""
    error: str = ""


class Spool:
    """Entries, two JSON objects about a concept each, and bulk pictures. To be closed, as by `with`."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a file of its own, which SQLite deletes
        self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
        self._waiting: list[tuple[Any, ...]] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, rank: int, score: float, concept_id: str, fingerprint: str, row: Any, details: Any) -> None:
        """Add an entry: what the list shows of a concept, and its details. Entries are ordered by `rank`, then `score`,
        then id; `fingerprint` is that of the concept's result."""
        self._waiting.append((rank, score, _plain(concept_id), fingerprint, json.dumps(row), json.dumps(details)))
        if len(self._waiting) >= _BATCH:
            self._write()

    def add_pictures(self, pictures: Iterable[DrawnPicture]) -> None:
        """Add bulk pictures; those of results that no entry is about are never shown."""
        rows = (
            (each.concept_id, each.fingerprint, _plain(each.prompt), each.seed, each.path, _plain(each.error))
            for each in pictures
        )
        self._database.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)", rows)

    def finish(self) -> int:
        """Put the entries in order and return their number; nothing can be added any more."""
        self._write()
        self._database.executescript(_ORDER)
        return int(self._database.execute("SELECT count(*) FROM ordered").fetchone()[0])

    def has_pictures(self) -> bool:
        """Return whether an entry has bulk pictures."""
        query = "SELECT EXISTS (SELECT 1 FROM ordered o JOIN pictures p USING (concept, fingerprint))"
        return bool(self._database.execute(query).fetchone()[0])

    def rows(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """Yield row and number of drawn bulk pictures of the entries at these positions, in their order."""
        query = (
            "SELECT row, (SELECT count(*) FROM pictures p WHERE p.concept = o.concept AND "
            "p.fingerprint = o.fingerprint AND p.error = '') "
            "FROM ordered o WHERE position >= ? AND position < ? ORDER BY position"
        )
        for row, num_pictures in self._database.execute(query, (start, stop)):
            yield json.loads(row), num_pictures

    def details(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Yield position and details of the entries at these positions, in their order."""
        query = "SELECT position, details FROM ordered WHERE position >= ? AND position < ? ORDER BY position"
        for position, details in self._database.execute(query, (start, stop)):
            yield position, json.loads(details)

    def first_by_fingerprint(self, stop: int, most: int) -> Iterator[tuple[int, Any]]:
        """Yield position and row of the entries before position `stop` that have the smallest fingerprints."""
        query = "SELECT position, row FROM ordered WHERE position < ? ORDER BY fingerprint, position LIMIT ?"
        for position, row in self._database.execute(query, (stop, most)):
            yield position, json.loads(row)

    def pictures(self, start: int, stop: int) -> Iterator[tuple[int, list[DrawnPicture]]]:
        """Yield position and bulk pictures, by prompt and seed, of the entries at these positions that have some; no
        error of a picture that was drawn later."""
        query = (
            "SELECT position, p.concept, p.fingerprint, prompt, seed, path, error FROM ordered o "
            "JOIN pictures p ON p.concept = o.concept AND p.fingerprint = o.fingerprint "
            "WHERE position >= ? AND position < ? ORDER BY position, prompt, seed, path"
        )
        found = self._database.execute(query, (start, stop))
        for position, rows in groupby(found, key=lambda row: int(row[0])):
            pictures = {row[2:6]: DrawnPicture(*row[1:]) for row in rows}.values()
            drawn = {(each.prompt, each.seed) for each in pictures if not each.error}
            yield position, [each for each in pictures if not each.error or (each.prompt, each.seed) not in drawn]

    def _write(self) -> None:
        self._database.executemany("INSERT INTO concepts VALUES (?, ?, ?, ?, ?, ?)", self._waiting)
        self._waiting.clear()


def _plain(text: str) -> str:
    """Return a text without lone surrogates, which SQLite refuses; a file's name may have some."""
    return text.encode("utf-8", "replace").decode()
