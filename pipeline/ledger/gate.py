"""The quality gate: decides from scores whether a learned concept is good enough and which try is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.ledger.records import ConceptRecord, Try
from pipeline.sample_config import GateConfig

PASSED = "passed"
BELOW = "below"

_REFERENCES = ("clip_i_initializer", "clip_t_initializer")


def shortfalls(scores: Mapping[str, float], gate: GateConfig) -> dict[str, float]:
    """Return how far the scores are below each bound of the gate, by the bound's name; 0 where they reach it.

    Bounds that are not set, or whose scores are missing, are left out.
    """
    found = {}
    for score in ("clip_i", "clip_t"):
        start = scores.get(f"{score}_initializer")
        for name, reference in ((f"min_{score}", 0.0), (f"min_{score}_gain", start)):
            bound = getattr(gate, name)
            if bound is not None and score in scores and reference is not None:
                found[name] = max(0.0, bound - (scores[score] - reference))
    word, photos = scores.get("clip_i_initializer"), scores.get("clip_i_photos")
    if gate.min_clip_i_share is not None and "clip_i" in scores and word is not None and photos is not None:
        found["min_clip_i_share"] = max(0.0, word + gate.min_clip_i_share * (photos - word) - scores["clip_i"])
    others = scores.get("clip_i_others")
    if gate.min_clip_i_margin is not None and "clip_i" in scores and others is not None:
        found["min_clip_i_margin"] = max(0.0, gate.min_clip_i_margin - (scores["clip_i"] - others))
    return found


def verdict(scores: Mapping[str, float], gate: GateConfig) -> str:
    """Return `passed` or `below`; empty without scores or without bounds."""
    found = shortfalls(scores, gate)
    if not found:
        return ""
    return BELOW if any(found.values()) else PASSED


def gate_verdict(record: ConceptRecord, gate: GateConfig) -> str:
    """Return the `verdict` on the scores that a record shows."""
    references = against_first(record.tries[0], record.tries) if record.tries else record.scores
    return verdict({**record.scores, **{name: references[name] for name in _REFERENCES if name in references}}, gate)


def best(tries: Sequence[Try], gate: GateConfig) -> Try:
    """Return the try with the smallest sum of shortfalls; among equals the one with the highest CLIP-I, then the first.

    All tries are compared with the initializer word of the first one, because another try may have started from another
    word. Raises ValueError if every try failed.
    """
    whole = [each for each in tries if not each.error]
    if not whole:
        raise ValueError("all tries failed")
    scores = {id(each): against_first(each, tries) for each in whole}
    return min(
        whole, key=lambda each: (sum(shortfalls(scores[id(each)], gate).values()), -each.scores.get("clip_i", 0.0))
    )


def against_first(one: Try, tries: Sequence[Try]) -> dict[str, float]:
    """Return the scores of `one` with the initializer word's scores of the first try."""
    first = {name: tries[0].scores[name] for name in _REFERENCES if name in tries[0].scores}
    return {**one.scores, **first}
