"""The quality gate's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.ledger.gate import BELOW, PASSED, best, gate_verdict, shortfalls, verdict
from pipeline.ledger.records import ConceptRecord, Try
from pipeline.sample_config import GateConfig

SCORES = {"clip_i": 0.7, "clip_i_initializer": 0.5, "clip_i_photos": 0.9, "clip_t": 0.2, "clip_t_initializer": 0.3}


def one(number: int, **scores: float) -> Try:
    return Try(rung=f"r{number}", fingerprint=f"{number:032x}", scores=scores)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({}, PASSED),  # better than the initializer word
        ({"min_clip_i_gain": 0.25}, BELOW),
        ({"min_clip_i": 0.7}, PASSED),
        ({"min_clip_i": 0.71}, BELOW),
        ({"min_clip_t": 0.1, "min_clip_t_gain": -0.15}, PASSED),
        ({"min_clip_t_gain": -0.05}, BELOW),
        ({"min_clip_i_gain": None}, ""),
        ({"min_clip_i_share": 0.49}, PASSED),  # it has gone from 0.5 to 0.7 of 0.9
        ({"min_clip_i_share": 0.51}, BELOW),
    ],
)
def test_bounds(gate: dict[str, float], expected: str) -> None:
    assert verdict(SCORES, GateConfig(**gate)) == expected


@pytest.mark.parametrize(
    ("others", "margin", "expected"),
    [(0.69, 0.0, PASSED), (0.71, 0.0, BELOW), (0.71, -0.02, PASSED), (0.69, 0.02, BELOW), (0.99, None, PASSED)],
)
def test_no_other_concept_may_be_nearer(others: float, margin: float | None, expected: str) -> None:
    scores = {**SCORES, "clip_i_others": others}
    assert verdict(scores, GateConfig(min_clip_i_margin=margin)) == expected


def test_what_there_is_no_score_for_is_not_judged() -> None:
    assert verdict({}, GateConfig(min_clip_i=0.9)) == ""
    assert verdict({"clip_i": 0.1}, GateConfig()) == ""  # without an initializer there is nothing to be better than
    one_photo = {"clip_i": 0.2, "clip_i_initializer": 0.1}
    assert verdict(one_photo, GateConfig(min_clip_i_share=0.5)) == PASSED  # by the gain alone
    assert shortfalls({"clip_i": 0.1}, GateConfig(min_clip_i=0.4)) == pytest.approx({"min_clip_i": 0.3})


def test_photos_that_differ_more_than_they_differ_from_the_words_pictures() -> None:
    scores = {"clip_i": 0.65, "clip_i_initializer": 0.7, "clip_i_photos": 0.6}
    assert shortfalls(scores, GateConfig(min_clip_i_share=0.5)) == pytest.approx(
        {"min_clip_i_gain": 0.05, "min_clip_i_share": 0.0}
    )


def test_the_best_falls_short_by_the_least_and_then_is_most_like_the_photos() -> None:
    gate = GateConfig(min_clip_i=0.6, min_clip_t=0.2)
    poor, faithful, balanced = (
        one(0, clip_i=0.3, clip_t=0.3),
        one(1, clip_i=0.9, clip_t=0.0),
        one(2, clip_i=0.5, clip_t=0.2),
    )
    assert best([poor, faithful, balanced], gate) is balanced
    assert best([one(0, clip_i=0.7, clip_t=0.3), one(1, clip_i=0.8, clip_t=0.2)], gate).rung == "r1"
    assert best([poor, poor], gate) is poor
    failed = Try(rung="r", fingerprint="f", error="not finite")
    assert best([poor, failed], gate) is poor
    with pytest.raises(ValueError, match="all tries failed"):
        best([failed], gate)


def test_tries_are_held_against_the_first_ones_word() -> None:
    """A try that began from a worse word would else look like a gain."""
    gate = GateConfig(min_clip_i_gain=0.1)
    first = one(0, clip_i=0.55, clip_i_initializer=0.5)
    other = one(1, clip_i=0.5, clip_i_initializer=0.1)
    assert best([first, other], gate) is first


def record(**values: Any) -> ConceptRecord:
    return ConceptRecord(concept_id="a", fingerprint="f", status="done", placeholder_token="<a>", **values)


def test_a_record_is_judged_by_what_it_keeps() -> None:
    first = one(0, clip_i=0.4, clip_i_initializer=0.5)
    assert gate_verdict(record(scores=first.scores), GateConfig()) == BELOW
    kept = one(1, clip_i=0.45, clip_i_initializer=0.2)
    assert gate_verdict(record(scores=kept.scores, tries=(first, kept)), GateConfig()) == BELOW
    assert gate_verdict(record(scores={**kept.scores, "clip_i": 0.6}, tries=(first, kept)), GateConfig()) == PASSED
