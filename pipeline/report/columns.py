"""The columns of the report's list of concepts: names, titles, and what a record gives for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.records import ConceptRecord

MAX_CARRIED = 40
"""Largest number of the manifest's other columns on the page; those that come first are taken."""

MAX_CHOICES = 50
"""Largest number of different values of a column that the page offers as a choice."""

CARRIED = "carried:"
"""Beginning of the names of the manifest's other columns."""

_MAX_TEXT = 200
_LARGEST_EXACT = 2**53

_TITLES = {
    "concept": "concept",
    "status": "status",
    "gate": "gate",
    "category": "category",
    "placeholder": "placeholder",
    "initializer": "initializer",
    "clip_i": "CLIP-I",
    "clip_i_gain": "CLIP-I gain",
    "clip_t": "CLIP-T",
    "clip_t_gain": "CLIP-T gain",
    "clip_i_initializer": "CLIP-I of the initializer",
    "clip_t_initializer": "CLIP-T of the initializer",
    "clip_i_others": "CLIP-I to another concept",
    "clip_i_photos": "CLIP-I among photos",
    "steps": "steps",
    "seconds": "seconds",
    "tries": "tries",
    "attempts": "attempts",
    "pictures": "pictures drawn",
    "finished": "finished",
    "kind": "kind of error",
    "error": "error",
}
"""Titles of the columns that are not the manifest's, in their order; a score without one has its name as the title."""

_SCORES_END = "clip_i_photos"
"""Column behind which scores without a title stand."""


@dataclass(slots=True)
class Column:
    """A column of the list: what it holds, as far as the page offers sorting and filters by it."""

    name: str
    title: str
    is_number: bool = True
    """True if every value is a number."""
    choices: Counter[str] | None = field(default_factory=Counter)
    """Number of rows by text; None for numbers, and for more than `MAX_CHOICES` texts."""

    def add(self, value: Any) -> None:
        """Take in a value of a row."""
        self.is_number &= isinstance(value, int | float) and not isinstance(value, bool)
        if self.choices is not None:
            self.choices[str(value)] += 1
            if len(self.choices) > MAX_CHOICES:
                self.choices = None

    def describe(self) -> dict[str, Any]:
        """Return the column as the page's script reads it."""
        choices = None if self.is_number or self.choices is None else sorted(self.choices.items())
        return {"name": self.name, "title": self.title, "number": self.is_number, "choices": choices}


class Columns:
    """The columns of all rows so far."""

    def __init__(self) -> None:
        self._found: dict[str, Column] = {}
        self._num_carried = 0
        self.num_left_out = 0
        """Columns of the manifest beyond `MAX_CARRIED`."""
        self._left_out: set[str] = set()

    def add(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Take in a row, column name -> value, and return the values that the page shows."""
        kept = {}
        for name, value in values.items():
            if value is None or value == "":
                continue
            column = self._found.get(name) or self._new(name)
            if column is not None:
                kept[name] = shown = _shown(value)
                column.add(shown)
        return kept

    def in_order(self) -> list[Column]:
        """Return the columns that have a value, in the page's order: own columns, scores, the manifest's."""
        places = {name: place for place, name in enumerate(_TITLES)}

        def key(column: Column) -> tuple[int, bool]:
            if column.name.startswith(CARRIED):
                return len(places), False
            return places.get(column.name, places[_SCORES_END]), column.name not in places

        return sorted(self._found.values(), key=key)

    def _new(self, name: str) -> Column | None:
        """Return a new column; None where the page has no room for it."""
        is_carried = name.startswith(CARRIED)
        if is_carried and self._num_carried >= MAX_CARRIED:
            self._left_out.add(name)
            self.num_left_out = len(self._left_out)
            return None
        self._num_carried += is_carried
        self._found[name] = Column(name, _TITLES.get(name, name.removeprefix(CARRIED)))
        return self._found[name]


def values_of(record: ConceptRecord) -> dict[str, Any]:
    """Return a record's value for each column."""
    scores = record.scores
    gains = {
        f"{score}_gain": scores[score] - scores[f"{score}_initializer"]
        for score in ("clip_i", "clip_t")
        if {score, f"{score}_initializer"} <= scores.keys()
    }
    is_done = record.status == "done"
    return {
        "concept": record.concept_id,
        "status": record.status,
        "gate": record.gate,
        "category": record.category,
        "placeholder": record.name_in_prompts,
        "initializer": record.initializer,
        "steps": record.steps if is_done else None,
        "seconds": round(record.seconds, 1) if is_done else None,
        "tries": max(1, len(record.tries)) if is_done else None,
        "attempts": record.attempts,
        "finished": record.finished_at,
        "kind": record.error_kind,
        "error": record.error,
        **{name: round(value, 4) for name, value in {**scores, **gains}.items()},
        **{CARRIED + name: value for name, value in record.carried.items()},
    }


def title_of_score(name: str) -> str:
    """Return a score's name for a person."""
    return _TITLES.get(name, name)


def _shown(value: Any) -> Any:
    """Return a value as the page can show it: long texts are cut; whole numbers above 2^53, which JavaScript rounds,
    and numbers that are not finite, which JSON does not have, are text."""
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else f"{value[: _MAX_TEXT - 1]}…"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and math.isfinite(value):
        is_exact = isinstance(value, float) or abs(value) <= _LARGEST_EXACT
        return value if is_exact else str(value)
    return _shown(str(value))
