"""Figures and table rows over all records, taken in one by one: no list of records is ever held."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable, Iterator

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from pipeline.ledger.gate import BELOW
from pipeline.ledger.records import ConceptRecord
from pipeline.report.failures import Failures

COLUMNS = ("Concept", "Placeholder", "Initializer", "CLIP-I", "gain", "CLIP-T", "Steps", "Seconds", "Gate")

MAX_ROWS = 50_000
"""Largest number of rows in the page's table; results.parquet holds all."""

MAX_CARRIED = 4
"""Largest number of the manifest's other columns in the table; the ones that come first are taken."""

_LARGEST_EXACT = 2**53

_Key = tuple[bool, float, str]
"""Sorts concepts: those below the gate first, then those with the lowest CLIP-I, then by id."""


class Overview:
    """Figures over all records so far. A table row is kept as the few hundred bytes of JSON that the page holds."""

    def __init__(self, num_shown: int) -> None:
        """Start without records. The `num_shown` worst records are kept whole."""
        self.num_done = 0
        self.num_below = 0
        self.num_failed = 0
        self.failures = Failures()
        self.carried: list[str] = []
        self._num_shown = num_shown
        self._worst: list[tuple[_Key, ConceptRecord]] = []
        self._rows: list[tuple[_Key, str]] = []
        self._values: dict[str, array[float]] = {}

    def adding(self, records: Iterable[ConceptRecord]) -> Iterator[ConceptRecord]:
        """Add records and yield each."""
        for record in records:
            self.add(record)
            yield record

    def add(self, record: ConceptRecord) -> None:
        """Add a record."""
        if record.status == "failed":
            self.num_failed += 1
            self.failures.add(record.error_kind, record.concept_id, record.concept_id, record.error)
            return
        self.num_done += 1
        self.num_below += record.gate == BELOW
        for name, value in record.scores.items():
            self._values.setdefault(name, array("d")).append(value)
        if record.seconds > 0:
            self._values.setdefault("seconds", array("d")).append(record.seconds)
        new = [name for name in record.carried if name not in self.carried]
        self.carried += new[: MAX_CARRIED - len(self.carried)]
        key = record.gate != BELOW, record.scores.get("clip_i", math.inf), record.concept_id
        self._rows.append((key, str(htmlsafe_json_dumps(self._row(record)))))
        self._worst.append((key, record))
        if len(self._worst) > 2 * self._num_shown + 100:
            self._drop_best()
        if len(self._rows) > 2 * MAX_ROWS:
            self._rows = sorted(self._rows)[:MAX_ROWS]

    @property
    def has_scores(self) -> bool:
        return any(name != "seconds" for name in self._values)

    def worst(self) -> list[ConceptRecord]:
        """Return the records that are kept whole, the worst first."""
        self._drop_best()
        return [record for _, record in self._worst]

    def rows(self) -> list[Markup]:
        """Return the table's rows as JSON, the worst first: the values of `COLUMNS` and `carried`, then the folder."""
        return [Markup(text) for _, text in sorted(self._rows)[:MAX_ROWS]]  # `add` has escaped them

    def medians(self) -> dict[str, float]:
        """Return the medians over all done concepts of every score and of `seconds`, where there are values."""
        return {name: statistics.median(values) for name, values in self._values.items()}

    def scale(self, name: str) -> tuple[float, float]:
        """Return the ends of a score's axis, around all its values and those that it is compared with."""
        found = [values for key, values in self._values.items() if key.startswith(name)]
        low = min((min(values) for values in found), default=0.0)
        high = max((max(values) for values in found), default=1.0)
        pad = 0.06 * (high - low) or 0.05
        return low - pad, high + pad

    def _drop_best(self) -> None:
        self._worst.sort(key=lambda pair: pair[0])
        del self._worst[self._num_shown :]

    def _row(self, record: ConceptRecord) -> list[object]:
        scores = record.scores
        has_gain = {"clip_i", "clip_i_initializer"} <= scores.keys()
        gain = scores["clip_i"] - scores["clip_i_initializer"] if has_gain else None
        shown = (scores.get("clip_i"), gain, scores.get("clip_t"))
        numbers = [None if value is None else round(value, 3) for value in shown]
        gate = record.gate + (f", {len(record.tries)} tries" if record.tries else "")
        own = [record.concept_id, record.name_in_prompts, record.initializer, *numbers, record.steps]
        carried = [_shown(record.carried.get(name)) for name in self.carried]
        # A carried column that appears later is empty in this row.
        carried += [None] * (MAX_CARRIED - len(carried))
        return [*own, round(record.seconds, 1), gate, *carried, record.result.root]


def _shown(value: object) -> object:
    """Return a carried value as the page can show it: JavaScript rounds whole numbers above 2^53, so they are text."""
    return str(value) if isinstance(value, int) and abs(value) > _LARGEST_EXACT else value
