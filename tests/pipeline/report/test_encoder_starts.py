"""Starts from an encoder: which concepts had one, and the steps that this saved."""

from __future__ import annotations

from pipeline.ledger.records import ConceptRecord, Try
from pipeline.report.encoder_starts import EncoderStarts

UNSURE = "words, the encoder was unsure: the photos lie 0.68 from those it was trained on, usual is up to 0.60"


def record(start: str, steps: int, *tries: Try) -> ConceptRecord:
    return ConceptRecord(
        concept_id="c",
        fingerprint="f",
        status="done",
        placeholder_token="<c>",
        start=start,
        steps=steps,
        tries=tries,
    )


def test_steps_are_those_of_all_tries_of_concepts_that_started_from_the_encoder() -> None:
    starts = EncoderStarts()
    first, second = Try(rung="", fingerprint="f", start="encoder", steps=50), Try(rung="r", fingerprint="g", steps=200)
    for each in (
        record("encoder", 50),
        record("words", 200, first, second),  # the second try, from words, is kept
        record(UNSURE, 400),
        record("words", 400),
    ):
        starts.add(each)
    assert (starts.num_used, starts.num_unsure, starts.steps) == (2, 1, 300)
    assert starts.steps_saved(400) == 500
    assert starts.steps_saved(100) == -100
