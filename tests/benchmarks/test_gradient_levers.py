"""Cheaper gradients: what is left out, what is made smaller, and what is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gradient_levers import (
    BINS,
    MID_AND_UP,
    SAME_PICTURE,
    SAME_TIMESTEP,
    UP,
    VARIANTS,
    WHOLE,
    Samples,
    cosines,
    draw_samples,
    gradient,
    halved,
    learning_settings,
    seen_at_half_size,
)
from pipeline.config_file import RECIPES, load_config
from textual_inversion.families.base import Backbone


@pytest.fixture
def samples(tiny_backbone: Backbone) -> Samples:
    latents = torch.randn(3, *tiny_backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return draw_samples(tiny_backbone, latents, 4, 5, torch.Generator().manual_seed(2))


@pytest.fixture
def rows(tiny_backbone: Backbone) -> dict[str, torch.Tensor]:
    return {key: table.weight[5].float() for key, table in tiny_backbone.token_tables.items()}


def test_samples_are_of_one_tenth_of_the_timesteps_and_of_all_photos(samples: Samples) -> None:
    assert ((samples.timesteps >= 500) & (samples.timesteps < 600)).all()
    assert torch.equal(samples.latents[0], samples.latents[3])
    assert not torch.equal(samples.noise[0], samples.noise[3])


def test_half_the_size_keeps_the_deviation_of_noise_and_the_means_of_latents() -> None:
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    small = 2 * halved(noise)
    assert small.shape == (2, 4, 32, 32)
    assert float(small.std()) == pytest.approx(1, abs=0.03)
    assert torch.allclose(halved(torch.full((1, 1, 4, 4), 3.0)), torch.full((1, 1, 2, 2), 3.0))


def test_a_smaller_picture_with_a_quarter_of_the_noise_is_at_an_earlier_timestep(tiny_backbone: Backbone) -> None:
    timesteps = torch.tensor([0, 300, 700, 999])
    earlier = seen_at_half_size(tiny_backbone.noise, timesteps)
    assert earlier[0] == 0
    assert (earlier[1:] < timesteps[1:]).all()
    latents, nothing = torch.ones(4, 1), torch.zeros(4, 1)

    def ratio(at: torch.Tensor) -> torch.Tensor:
        signal, _ = tiny_backbone.noise.corrupt(latents, nothing, at)
        deviation, _ = tiny_backbone.noise.corrupt(nothing, latents, at)
        return (signal / deviation).square().flatten()

    torch.testing.assert_close(ratio(earlier)[1:], 4 * ratio(timesteps)[1:], rtol=0.05, atol=0)


def test_a_shorter_backward_pass_changes_gradients_and_leaves_the_model_as_it_was(
    tiny_backbone: Backbone, samples: Samples, rows: dict[str, torch.Tensor]
) -> None:
    before = gradient(tiny_backbone, rows, samples)
    cheap = {variant: gradient(tiny_backbone, rows, samples, variant) for variant in VARIANTS}
    assert torch.equal(gradient(tiny_backbone, rows, samples), before)
    assert all(each.shape == before.shape and each.abs().max() > 0 for each in cheap.values())
    assert not torch.equal(cheap[MID_AND_UP], before)
    assert not torch.equal(cheap[UP], cheap[MID_AND_UP])
    assert not torch.equal(cheap[SAME_TIMESTEP], cheap[SAME_PICTURE])


def test_rows_are_learned_by_whole_gradients_whatever_the_recipe_has() -> None:
    recipe = load_config((RECIPES / "demo.toml").read_text()).inversion
    assert learning_settings() == replace(recipe, gradient_path="whole")


def test_cosines_are_by_tenth_then_of_all_then_of_the_noisy_half_alone() -> None:
    up, right = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    found = cosines({WHOLE: [up] * BINS, "turned": [right] * BINS, "half": [up] * 5 + [right] * 5})
    assert found["turned"] == pytest.approx([0.0] * BINS + [0.0, 0.5**0.5])
    assert found["half"] == pytest.approx([1.0] * 5 + [0.0] * 5 + [0.5**0.5] * 2)
    assert set(found) == {"turned", "half"}
