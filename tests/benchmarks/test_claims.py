"""The order of the paper's setups as answers, and every setup that a claim names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import BASE, ORDER, QUESTIONS, main, parse, show_order
from benchmarks.setups import find


def rows(setup: str, clip_i: tuple[float, float, float], clip_t: float) -> list[dict[str, Any]]:
    return [
        {"setup": setup, "concept_id": name, "seed": 0, "clip_i": value, "clip_t": clip_t}
        for name, value in zip("abc", clip_i, strict=True)
    ]


def test_claims_are_answered_by_their_intervals() -> None:
    measured = [
        *rows(BASE, (0.5, 0.6, 0.7), 0.4),
        *rows("high-lr", (0.6, 0.71, 0.8), 0.5),
        *rows("low-lr", (0.5, 0.9, 0.3), 0.5),
        *rows("2-word", (0.51, 0.59, 0.7), 0.3),
        *rows("3-word", (0.7, 0.8, 0.91), 0.3),
    ]
    answers = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in
               show_order(measured).splitlines()[2:]}  # fmt: skip
    assert answers["the high rate is nearer to the photos"] == "as claimed"
    assert answers["the high rate follows the prompt less"] == "not so"
    assert answers["the low rate is farther from the photos"] == "undecided"
    assert answers["two vectors are no nearer to the photos"] == "as claimed"
    assert answers["three vectors are no nearer to the photos"] == "not so"
    assert answers["long captions are farther from the photos"] == "not measured"


def test_every_claim_is_of_a_setup() -> None:
    assert {find(setup).what for _, setup, _, _ in ORDER}
    assert parse([]).only == list(QUESTIONS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\na photo of a {} on the beach\n")
    small = ["grid.sampling.steps=2", "grid.images_per_prompt=1", "grid.prompts=['a photo of a {}']"]
    questions = ["composition", "bias", "style", "mask"]
    options = ["--concepts", "2", "--steps", "2", "--samples", "1", "--bias-pictures", "2", "--objects", "cat",
               "--no-outside", "--prompts", str(prompts), "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(["--only", *questions, *options, *(f"--set={each}" for each in small)]) == 0
    said = capsys.readouterr().out
    for words in ("two learned concepts", "| car | learned anew | 0 |", "learned line-art", "| masked less unmasked |"):
        assert words in said
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == set(questions)
