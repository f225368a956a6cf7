"""The noise process against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from textual_inversion.noise import corrupt

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_diffusers(prediction_type: str) -> None:
    latents, noise, t = batch()
    x_t, target = corrupt(latents, noise, t, SCHEDULER.alphas_cumprod, prediction_type)
    assert torch.equal(x_t, SCHEDULER.add_noise(latents, noise, t))
    expected = noise if prediction_type == "epsilon" else SCHEDULER.get_velocity(latents, noise, t)
    assert torch.equal(target, expected)


def test_unknown_prediction_type() -> None:
    with pytest.raises(ValueError, match="'flow' is unknown"):
        corrupt(*batch(), SCHEDULER.alphas_cumprod, "flow")
