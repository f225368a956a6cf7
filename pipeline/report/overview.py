"""What the page tells of all concepts together, taken in record by record: no list of records is ever held."""

from __future__ import annotations

import math
import re
import statistics
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from pipeline.ledger.gate import BELOW
from pipeline.ledger.records import ConceptRecord

COLUMNS = ("Concept", "Placeholder", "Initializer", "CLIP-I", "gain", "CLIP-T", "Steps", "Seconds", "Gate")

MAX_ROWS = 50_000
"""Rows the page's table can show (it draws some hundred at a time). All are in results.parquet."""

MAX_CARRIED = 4
"""Of the manifest's other columns; those seen first."""

_Key = tuple[bool, float, str]


class Overview:
    """Grows with every record; the table's rows are kept as the few hundred bytes that the page holds of them."""

    def __init__(self, num_shown: int) -> None:
        """`num_shown`: records that are kept whole, the worst ones."""
        self.num_done = 0
        self.num_below = 0
        self.num_failed = 0
        self.causes = Causes()
        self.carried: list[str] = []
        self._num_shown = num_shown
        self._worst: list[tuple[_Key, ConceptRecord]] = []
        self._rows: list[tuple[_Key, str]] = []
        self._values: dict[str, array[float]] = {}

    def passing(self, records: Iterable[ConceptRecord]) -> Iterator[ConceptRecord]:
        """Hand records on, each taken in on its way."""
        for record in records:
            self.add(record)
            yield record

    def add(self, record: ConceptRecord) -> None:
        if record.status == "failed":
            self.num_failed += 1
            self.causes.add(record.concept_id, record.concept_id, record.error)
            return
        self.num_done += 1
        self.num_below += record.gate == BELOW
        for name, value in record.scores.items():
            self._values.setdefault(name, array("d")).append(value)
        if record.seconds > 0:
            self._values.setdefault("seconds", array("d")).append(record.seconds)
        new = [name for name in record.carried if name not in self.carried]
        self.carried += new[: MAX_CARRIED - len(self.carried)]
        # below the gate first, then the least like their photos
        key = record.gate != BELOW, record.scores.get("clip_i", math.inf), record.concept_id
        self._rows.append((key, str(htmlsafe_json_dumps(self._row(record)))))
        self._worst.append((key, record))
        if len(self._worst) > 2 * self._num_shown + 100:
            self._cut()
        if len(self._rows) > 2 * MAX_ROWS:
            self._rows = sorted(self._rows)[:MAX_ROWS]

    @property
    def has_scores(self) -> bool:
        return any(name != "seconds" for name in self._values)

    def worst(self) -> list[ConceptRecord]:
        """As many as are shown, the worst first."""
        self._cut()
        return [record for _, record in self._worst]

    def rows(self) -> list[Markup]:
        """JSON of the table's rows, the worst first: values in the order of `COLUMNS` and `carried`, and the folder."""
        return [Markup(text) for _, text in sorted(self._rows)[:MAX_ROWS]]  # escaped when they were made

    def medians(self) -> dict[str, float]:
        """Over all finished concepts, by name; only those there is a value for."""
        return {name: statistics.median(values) for name, values in self._values.items()}

    def scale(self, name: str) -> tuple[float, float]:
        """Where a score's axis begins and ends: around all values of the score and what it is compared with."""
        found = [values for key, values in self._values.items() if key.startswith(name)]
        low = min((min(values) for values in found), default=0.0)
        high = max((max(values) for values in found), default=1.0)
        pad = 0.06 * (high - low) or 0.05
        return low - pad, high + pad

    def _cut(self) -> None:
        self._worst.sort(key=lambda pair: pair[0])
        del self._worst[self._num_shown :]

    def _row(self, record: ConceptRecord) -> list[object]:
        scores = record.scores
        with_gain = {"clip_i", "clip_i_initializer"} <= scores.keys()
        gain = scores["clip_i"] - scores["clip_i_initializer"] if with_gain else None
        numbers = [
            value if value is None else round(value, 3) for value in (scores.get("clip_i"), gain, scores.get("clip_t"))
        ]
        gate = record.gate + (f", {len(record.tries)} tries" if record.tries else "")
        own = [record.concept_id, record.placeholder_token, record.initializer, *numbers, record.steps]
        carried = [record.carried.get(name) for name in self.carried]
        # a column that comes up later is empty in the rows before it
        carried += [None] * (MAX_CARRIED - len(carried))
        return [*own, round(record.seconds, 1), gate, *carried, record.result.root]


_MAX_NAMES = 200


@dataclass(frozen=True, slots=True)
class Cause:
    """All that failed for one cause, told in the words of the first."""

    cause: str
    names: tuple[str, ...]
    """Of the first 200."""
    count: int


class Causes:
    """Groups of failures, made one by one: two causes that differ only in numbers or in the concept's id are one."""

    def __init__(self) -> None:
        self._groups: dict[str, Cause] = {}

    def add(self, name: str, concept_id: str, cause: str) -> None:
        """`concept_id`: empty for what is no concept's."""
        alike = re.sub(r"\d+", "#", cause.replace(concept_id, "…") if concept_id else cause)
        before = self._groups.get(alike, Cause(cause, (), 0))
        names = (*before.names, name) if before.count < _MAX_NAMES else before.names
        self._groups[alike] = Cause(before.cause, names, before.count + 1)

    def ranked(self) -> list[Cause]:
        """Most frequent first."""
        return sorted(self._groups.values(), key=lambda cause: -cause.count)


def by_cause(failures: Iterable[tuple[str, str, str]]) -> list[Cause]:
    """(name, concept id or "", cause) of each failure -> groups, most frequent first."""
    causes = Causes()
    for failure in failures:
        causes.add(*failure)
    return causes.ranked()
