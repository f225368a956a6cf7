"""Grids of few steps: scores, differences and verdicts against those of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.few_step_grids import REFERENCE, Grid, agreement, alike, draw, row_of
from pipeline.sample_config import GateConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone


def test_each_way_is_drawn_and_scored_with_its_own_steps_and_noise(tiny_backbone: Backbone, judge: Path) -> None:
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="cat")
    rows = {key: torch.ones(1, table.dim) for key, table in tiny_backbone.token_tables.items()}
    embedding = LearnedEmbedding(placeholder_token="<c>", vectors=rows)
    photos = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    ways = {"1": (1, 0), "again": (1, 0), "2": (2, 0), "other noise": (1, 1)}
    found = draw(tiny_backbone, ClipExtractor(str(judge), "cpu"), concept, photos, embedding, ways)
    assert found["1"].scores == found["again"].scores
    assert len({found[name].scores["clip_i"] for name in ("1", "2", "other noise")}) == 3
    assert {"clip_i_initializer", "clip_i_photos", "clip_t"} <= set(found["1"].scores)


def grid(clip_i: float, seconds: float = 1.0) -> Grid:
    return Grid({"clip_i": clip_i, "clip_t": 0.5, "clip_i_initializer": 0.2, "clip_i_photos": 0.8}, seconds)


def test_a_row_compares_with_the_reference_concept_by_concept() -> None:
    drawn = [{"4": grid(0.5, 0.2), REFERENCE: grid(0.6)}, {"4": grid(0.1, 0.4), REFERENCE: grid(0.3)}]
    name, seconds, clip_i, clip_t, correlation, verdicts = row_of("4", drawn, {"gate": GateConfig()})
    assert (name, seconds, correlation) == ("4", pytest.approx(0.3), pytest.approx(1.0))
    assert str(clip_i).startswith("-0.150 ±")
    assert str(clip_t).startswith("+0.000")
    assert verdicts == "1 of 2 (2 pass by 20 steps)"


def test_verdicts_and_scores_that_do_not_vary() -> None:
    pairs = [(grid(0.7).scores, grid(0.7).scores)]
    assert agreement(pairs, GateConfig(min_clip_i_share=0.75)) == "1 of 1 (1 pass by 20 steps)"
    assert alike([0.1, 0.1], [0.2, 0.3]) is None
