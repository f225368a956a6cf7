"""Is a learned concept good enough, and which of several tries is the best? Arithmetic on scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import GateConfig
from pipeline.ledger.records import ConceptRecord, Try

PASSED, BELOW = "passed", "below"

_REFERENCES = ("clip_i_initializer", "clip_t_initializer")


def shortfalls(scores: Mapping[str, float], gate: GateConfig) -> dict[str, float]:
    """Bound of the gate -> how far the scores are below it, 0 where they reach it; only bounds that can be judged."""
    found = {}
    for score in ("clip_i", "clip_t"):
        start = scores.get(f"{score}_initializer")
        for name, reference in ((f"min_{score}", 0.0), (f"min_{score}_gain", start)):
            bound = getattr(gate, name)
            if bound is not None and score in scores and reference is not None:
                found[name] = max(0.0, bound - (scores[score] - reference))
    return found


def verdict(scores: Mapping[str, float], gate: GateConfig) -> str:
    """`passed` or `below`; empty if there is nothing to judge, or no bound to judge it by."""
    missing = shortfalls(scores, gate)
    return "" if not missing else BELOW if any(missing.values()) else PASSED


def judge(record: ConceptRecord, gate: GateConfig) -> str:
    """`verdict` of what a record keeps."""
    references = against_first(record.tries[0], record.tries) if record.tries else record.scores
    return verdict({**record.scores, **{name: references[name] for name in _REFERENCES if name in references}}, gate)


def best(tries: Sequence[Try], gate: GateConfig) -> Try:
    """The one that falls short by the least in all, then the one most like the photos, then the earliest.

    All are held against the first one's initializer word, as another try may have begun from another word. Raises
    ValueError if there is nothing to keep.
    """
    whole = [each for each in tries if not each.error]
    if not whole:
        raise ValueError("all tries failed")
    scores = {id(each): against_first(each, tries) for each in whole}
    return min(
        whole, key=lambda each: (sum(shortfalls(scores[id(each)], gate).values()), -each.scores.get("clip_i", 0.0))
    )


def against_first(one: Try, tries: Sequence[Try]) -> dict[str, float]:
    """Its scores, with the initializer word's of the first try."""
    first = {name: tries[0].scores[name] for name in _REFERENCES if name in tries[0].scores}
    return {**one.scores, **first}
