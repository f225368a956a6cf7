"""Steadiness over seeds: derived rows and the table by hand, candidates as settings, the gate's scores in a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.jobs import measure_chunk
from benchmarks.methods import jobs_of
from benchmarks.steadiness import CANDIDATES, best_of_two, parse, show_steadiness
from tests.pipeline.runs import write_manifest
from tests.tiny_models import tiny_extractor


def row(seed: int, own: float, clip_i: float, seen: float) -> dict[str, Any]:
    return {"setup": "fast", "concept_id": "a", "seed": seed, "clip_own": own, "clip_i": clip_i, "psnr_db": 15.0,
            "seconds": 2.0, "gate": {"clip_i": seen}}  # fmt: skip


ROWS = [row(0, 0.0, 0.3, 0.2), row(1, 1.0, 0.7, 0.6), row(2, 1.0, 0.6, 0.9), row(3, 1.0, 0.9, 0.8), row(4, 0, 0, 0)]


def test_two_tries_keep_what_the_gate_likes_best() -> None:
    best = best_of_two(ROWS)
    assert [(each["seed"], each["clip_i"], each["seconds"]) for each in best] == [(1, 0.7, 4.0), (2, 0.6, 4.0)]
    assert {each["setup"] for each in best} == {"fast, best of two tries"}


def test_failures_and_spread_over_seeds() -> None:
    lines = show_steadiness([*ROWS, *best_of_two(ROWS)], ["clip_own"]).splitlines()
    # the deviation of 0.3, 0.7, 0.6, 0.9, 0 is 0.3536
    assert lines[2] == "| fast | 2 of 5 (12% to 77%) | 0.500 | 0.354 | 15.000 | 0.000 | 2 |"
    assert lines[3].startswith("| fast, best of two tries | 0 of 2 (0% to 66%) | 0.650 | 0.071 |")


def test_candidates_have_budgets_of_their_own() -> None:
    found = {name: setup.inversion(500, ()) for name, setup in CANDIDATES.items()}
    assert {name: (config.steps, config.batch_size) for name, config in found.items() if name != "default"} == {
        "fast": (200, 2), "fast-400": (400, 2), "fast-batch-4": (200, 4), "fast-auto-init": (200, 2),
        "fast-half-rate": (200, 2), "fast-half-rate-400": (400, 2), "fast-no-cap": (200, 2),
    }  # fmt: skip


def test_a_row_has_the_scores_that_the_gate_sees(tiny_model: Path, tmp_path: Path) -> None:
    clip = tiny_extractor("clip", tmp_path / "clip")
    manifest, prompts = write_manifest(tmp_path, ["a", "b"]), tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\n")
    settings = [f"model={tiny_model}", f"extractor={clip}", "generation.sampling.batch_size=2",
                "grid.sampling.batch_size=2", "grid.sampling.steps=2", "grid.images_per_prompt=1"]  # fmt: skip
    options = parse([
        "--manifest", str(manifest), "--prompts", str(prompts), "--no-outside", "--samples", "1", "--concepts", "1",
        "--seeds", "0", *(f"--set={each}" for each in settings),
    ])  # fmt: skip
    jobs, scoring = jobs_of(options, {"fast": replace(CANDIDATES["fast"], steps=2)})
    (found,) = measure_chunk(jobs, str(tmp_path / "out"), replace(scoring, gate=True))
    assert isinstance(found, dict)
    assert set(found["gate"]) >= {"clip_i", "clip_i_initializer", "clip_i_photos", "clip_i_others"}
    assert found["gate"]["clip_i"] != pytest.approx(found["clip_i"])  # other pictures
