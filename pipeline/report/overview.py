"""Figures over all records, taken in one by one: no list of records is ever held."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.gate import BELOW
from pipeline.ledger.records import ConceptRecord, Try
from pipeline.report.columns import Columns, values_of
from pipeline.report.encoder_starts import EncoderStarts
from pipeline.report.failures import STAGE, Failures
from pipeline.report.retry_gains import RetryGains
from pipeline.report.spool import Spool
from textual_inversion.errors import BAD_INPUT

_BELOW_GATE, _DONE, _FAILED = range(3)
"""Ranks of concepts in the page's order."""

_MAX_PHOTOS = 20
"""Largest number of a concept's photos whose addresses are on the page."""

_NO_SCORE = 1e9


class Overview:
    """Figures over all records so far. What the page says of each concept goes to a spool."""

    def __init__(self, spool: Spool) -> None:
        """Start without records."""
        self.num_done = 0
        self.num_below = 0
        self.num_failed = 0
        """Failed concepts and bad rows."""
        self.failures = Failures()
        self.columns = Columns()
        self.retry_gains = RetryGains()
        self.encoder_starts = EncoderStarts()
        self._spool = spool
        self._values: dict[str, array[float]] = {}

    def adding(self, records: Iterable[ConceptRecord]) -> Iterator[ConceptRecord]:
        """Add records and yield each."""
        for record in records:
            self.add(record)
            yield record

    def add(self, record: ConceptRecord) -> None:
        """Add a record."""
        rank = _BELOW_GATE if record.gate == BELOW else _DONE
        if record.status == "failed":
            rank = _FAILED
            self.num_failed += 1
            self.failures.add(record.error_kind, record.concept_id, record.concept_id, record.error)
        else:
            self._count(record)
        row = {
            "values": self.columns.add(values_of(record)),
            "folder": record.folder.fingerprint,
            "result": record.result.fingerprint,
            "name": record.name_in_prompts,
            "category": record.category,
            "num_photos": len(record.images),
        }
        details = {
            "name": record.name_in_prompts,
            "previews": asdict(record.previews) if record.previews else None,
            "facts": _facts(record),
            "photos": record.images[:_MAX_PHOTOS],
            "tries": [_describe_try(each, record) for each in record.tries],
        }
        score = record.scores.get("clip_i", _NO_SCORE)
        self._spool.add(rank, score, record.concept_id, record.result.fingerprint, row, details)

    def add_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Add rows of the manifest that make no concept."""
        for row in rows:
            place = f"row {row.row} of {row.file.rpartition('/')[2]}"
            name = f"{row.concept_id or 'unnamed'} ({place})"
            self.num_failed += 1
            self.failures.add(BAD_INPUT, name, row.concept_id or "", row.reason)
            values = {"concept": name, "status": "bad row", "kind": BAD_INPUT, "error": row.reason}
            self._spool.add(_FAILED, _NO_SCORE, name, "", {"values": self.columns.add(values)}, None)

    def add_problem(self, stage: str, error: str) -> None:
        """Add an error that is no concept's."""
        self.failures.add(STAGE, stage, "", error)

    @property
    def has_scores(self) -> bool:
        return any(name != "seconds" for name in self._values)

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

    def _count(self, record: ConceptRecord) -> None:
        self.num_done += 1
        self.num_below += record.gate == BELOW
        self.retry_gains.add(record)
        self.encoder_starts.add(record)
        for name, value in record.scores.items():
            self._values.setdefault(name, array("d")).append(value)
        if record.seconds > 0:
            self._values.setdefault("seconds", array("d")).append(record.seconds)


def _facts(record: ConceptRecord) -> dict[str, str]:
    """Return facts of a concept that are no columns, by name, those that are known."""
    drawn = record.sampling
    facts = {
        "placeholder": record.placeholder_token if record.prompt_as not in ("", record.placeholder_token) else "",
        "vectors": str(record.num_vectors) if record.num_vectors > 1 else "",
        "start": record.start,
        "drawn with": f"{drawn.solver}, {drawn.steps} steps, guidance {drawn.guidance_scale:g}" if drawn else "",
        "rolled back": f"{record.setbacks} times" if record.setbacks else "",
        "memory": record.memory,
        "equality": record.equality,
    }
    return {name: text for name, text in facts.items() if text}


def _describe_try(each: Try, record: ConceptRecord) -> dict[str, Any]:
    return {
        "rule": each.rung,
        "fingerprint": each.fingerprint,
        "kept": each.fingerprint == record.result.fingerprint,
        "scores": {name: round(value, 4) for name, value in each.scores.items() if math.isfinite(value)},
        "steps": each.steps,
        "seconds": round(each.seconds, 1),
        "error": each.error,
    }
