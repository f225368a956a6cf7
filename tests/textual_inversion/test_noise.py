"""The noise process against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler

from textual_inversion.noise import corrupt, min_snr_weights, predicted_latents

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_diffusers(prediction_type: str) -> None:
    latents, noise, t = batch()
    x_t, target = corrupt(latents, noise, SCHEDULER.alphas_cumprod[t], prediction_type)
    assert torch.equal(x_t, SCHEDULER.add_noise(latents, noise, t))
    expected = noise if prediction_type == "epsilon" else SCHEDULER.get_velocity(latents, noise, t)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_latents_back(prediction_type: str) -> None:
    latents, noise, t = batch()
    abar = SCHEDULER.alphas_cumprod[t]
    x_t, target = corrupt(latents, noise, abar, prediction_type)
    torch.testing.assert_close(predicted_latents(target, x_t, abar, prediction_type), latents, rtol=0, atol=1e-4)


def test_min_snr_weighs_either_prediction_as_it_weighs_the_latents() -> None:
    """Hang et al. 2023, section 3.4: the weighted losses on eps, on v and, by min(SNR, gamma), on x_0 are one."""
    latents, noise, t = batch()
    abar, gamma = SCHEDULER.alphas_cumprod[t].double(), 5.0
    snr = abar / (1 - abar)
    latents, noise = latents.double(), noise.double()
    wrong = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.minimum(snr, torch.tensor(gamma)) * (wrong - latents).square().flatten(1).mean(1)
    for prediction_type in ("epsilon", "v_prediction"):
        x_t, target = corrupt(latents, noise, abar, prediction_type)
        signal, sigma = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
        noise_of_wrong = (x_t - signal * wrong) / sigma
        said = noise_of_wrong if prediction_type == "epsilon" else signal * noise_of_wrong - sigma * wrong
        loss = (said - target).square().flatten(1).mean(1)
        torch.testing.assert_close(min_snr_weights(abar, gamma, prediction_type) * loss, expected)


def test_min_snr_spares_noisy_timesteps() -> None:
    weights = min_snr_weights(SCHEDULER.alphas_cumprod, 5.0, "epsilon")
    assert (weights == 1).nonzero().min() == 147  # by hand for this schedule: SNR falls below 5 there
    assert weights[10] == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("function", [min_snr_weights, corrupt, predicted_latents])
def test_unknown_prediction_type(function: Callable[..., object]) -> None:
    latents, noise, t = batch()
    abar = SCHEDULER.alphas_cumprod[t]
    arguments = (abar, 5.0) if function is min_snr_weights else (latents, noise, abar)
    with pytest.raises(ValueError, match="'flow' is unknown"):
        function(*arguments, "flow")
