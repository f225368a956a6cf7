"""Learning by cheaper gradients: the noisy half is smaller, the rest and what comes after are as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cheaper_learning import SmallerWhereNoisy, comparison, learning_by
from benchmarks.gradient_levers import MID_AND_UP, SAME_PICTURE, SAME_TIMESTEP, UP, VARIANTS, WHOLE
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.learning import learn_outcomes


@pytest.mark.parametrize("variant", [SAME_TIMESTEP, SAME_PICTURE])
def test_samples_of_the_noisy_half_have_half_the_side(tiny_backbone: Backbone, variant: str) -> None:
    noise = SmallerWhereNoisy(tiny_backbone.noise, variant)
    latents = torch.ones(1, *tiny_backbone.latent_shape)
    side = tiny_backbone.latent_shape[-1]

    def side_at(timestep: int) -> int:
        noisy, target = noise.corrupt(latents, torch.randn_like(latents), torch.tensor([timestep]))
        assert noisy.shape == target.shape
        return noisy.shape[-1]

    assert [side_at(timestep) for timestep in (0, 499, 500, 999)] == [side, side, side // 2, side // 2]
    early, late = (int(noise.model_timesteps(torch.tensor([each]))) for each in (400, 800))
    assert early == 400
    assert (late == 800) if variant == SAME_TIMESTEP else (late < 800)
    assert noise.num_timesteps == 1000


def test_each_way_learns_something_else_and_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(str(tiny_model), device="cpu", precision="float32")
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="cat")
    photos = [Image.new("RGB", (16, 16), "red")]
    config = InversionConfig(steps=6, batch_size=1)

    def learned(variant: str) -> Tensor:
        with learning_by(backbone, config, variant) as settings:
            [outcome] = learn_outcomes(backbone, [(concept, photos)], settings, slots=1, seed=0, extractor=None)
        assert outcome.embedding is not None
        return torch.cat([rows.flatten() for rows in outcome.embedding.vectors.values()])

    whole = learned(WHOLE)
    others = {variant: learned(variant) for variant in VARIANTS}
    assert torch.equal(learned(WHOLE), whole)
    assert not torch.equal(others[MID_AND_UP], whole)
    assert not torch.equal(others[UP], others[MID_AND_UP])
    assert not torch.equal(others[SAME_TIMESTEP], whole)
    assert not torch.equal(others[SAME_TIMESTEP], others[SAME_PICTURE])


def test_ways_are_compared_concept_by_concept() -> None:
    rows = [
        {"setup": setup, "concept_id": concept, "seed": 0, "clip_i": clip_i, "clip_t": 0.5}
        for setup, by in ((WHOLE, 0.0), (MID_AND_UP, -0.1))
        for concept, clip_i in (("a", 0.5 + by), ("b", 0.7 + by))
    ]
    text = comparison(rows)
    assert "| mid and up path | 0.500 ± 1.271 | -0.100 ± 0.000 | 0.500 ± 0.000 | +0.000 ± 0.000 |" in text
