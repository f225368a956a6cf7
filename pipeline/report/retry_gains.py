"""Gain of each rule of the quality gate's ladder over the first try, concept by concept."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from pipeline.ledger.records import ConceptRecord
from pipeline.report.intervals import Interval

_SCORES = ("clip_i", "clip_t")


@dataclass(slots=True)
class RuleGain:
    """The tries by one rule. Differences are of a try's score less the first try's, of concepts below the gate."""

    rule: str
    """The entry of `gate.ladder`."""
    tried: int = 0
    failed: int = 0
    kept: int = 0
    """Concepts whose kept result is of this rule."""
    differences: dict[str, array[float]] = field(default_factory=dict)
    """Differences by score."""

    def interval(self, score: str) -> Interval | None:
        """Return the mean difference of a score with its interval; None without a value."""
        return Interval.of(self.differences.get(score, ()))


class RetryGains:
    """Gains of all rules, taken in record by record."""

    def __init__(self) -> None:
        self._rules: dict[str, RuleGain] = {}

    def add(self, record: ConceptRecord) -> None:
        """Add a concept's tries, if it was tried again."""
        if not record.tries:
            return
        first = record.tries[0]
        for each in record.tries[1:]:
            gain = self._rules.setdefault(each.rung, RuleGain(each.rung))
            gain.tried += 1
            gain.failed += bool(each.error)
            gain.kept += each.fingerprint == record.kept
            for score in _SCORES:
                if score in each.scores and score in first.scores:
                    gain.differences.setdefault(score, array("d")).append(each.scores[score] - first.scores[score])

    def rules(self) -> list[RuleGain]:
        """Return the gain of each rule, in the order in which they were tried."""
        return list(self._rules.values())
