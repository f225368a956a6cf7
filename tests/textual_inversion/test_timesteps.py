from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from textual_inversion.config import TimestepConfig
from textual_inversion.noise import Epsilon, Noise, RectifiedFlow
from textual_inversion.timesteps import timestep_sampler

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
"""Stable Diffusion's."""

DRAWS = 50_000


def draws(config: TimestepConfig, schedule: Tensor = SCHEDULE, n: int = DRAWS, noise: Noise | None = None) -> Tensor:
    return timestep_sampler(config, noise or Epsilon(schedule, {}))(n, torch.Generator().manual_seed(0))


def assert_follows(t: Tensor, probabilities: Tensor) -> None:
    """Counts within five standard deviations of what the probabilities say."""
    expected = len(t) * probabilities
    counts = torch.bincount(t, minlength=len(probabilities))
    assert counts.shape == expected.shape
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_uniform_covers_every_timestep_alike() -> None:
    assert_follows(draws(TimestepConfig(), SCHEDULE[:10]), torch.full((10,), 0.1))


def test_a_range_is_uniform_within_and_leaves_out_its_end() -> None:
    probabilities = torch.zeros(20)
    probabilities[5:17] = 1 / 12
    assert_follows(draws(TimestepConfig(sampler="range", low=5, high=17), SCHEDULE[:20]), probabilities)


def test_snr_weighted_sampling_follows_the_closed_form() -> None:
    """TextBoost v1: p(t) proportional to max log SNR - log SNR(t); bins of ten timesteps."""
    snr = SCHEDULE.double() / (1 - SCHEDULE.double())
    weight = snr.log().max() - snr.log()
    t = draws(TimestepConfig(sampler="snr"))
    assert_follows(t // 10, (weight / weight.sum()).view(100, 10).sum(1))
    assert t.float().mean() == pytest.approx(584, abs=4)  # as computed from the formula elsewhere
    assert (t >= 500).float().mean() == pytest.approx(0.62, abs=0.01)


def test_snr_probabilities_of_three_timesteps_by_hand() -> None:
    abar = torch.tensor([0.5, 1 / (1 + torch.e), 1 / (1 + torch.e**3)])  # log SNR 0, -1, -3
    torch.testing.assert_close(
        Epsilon(abar, {}).snr_probabilities(), torch.tensor([0, 0.25, 0.75], dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


def test_logit_normal_sampling_follows_the_closed_form() -> None:
    edges = torch.special.logit(torch.linspace(0, 1, 101, dtype=torch.float64))
    probabilities = torch.special.ndtr(edges).diff()
    t = draws(TimestepConfig(sampler="logit_normal"), noise=RectifiedFlow(1000, shift=3.0))
    assert_follows(t // 10, probabilities)
    assert ((t >= 250) & (t < 750)).float().mean() == pytest.approx(0.728, abs=0.01)  # P(|x| < log 3)


def test_draws_belong_to_the_generator() -> None:
    for name in ("uniform", "range", "snr", "logit_normal"):
        config = TimestepConfig(sampler=name)
        assert torch.equal(draws(config, n=8), draws(config, n=8))
        other = timestep_sampler(config, Epsilon(SCHEDULE, {}))(8, torch.Generator().manual_seed(1))
        assert not torch.equal(draws(config, n=8), other)


def test_a_range_past_the_models_schedule() -> None:
    with pytest.raises(ValueError, match=r"timesteps.high = 900: this model's schedule has 100 timesteps"):
        draws(TimestepConfig(sampler="range", low=50, high=900), SCHEDULE[:100])


def test_a_schedule_without_signal_at_its_end() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR"):
        draws(TimestepConfig(sampler="snr"), torch.tensor([0.9, 0.5, 0.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_drawn_by_its_own_log_snr_and_never_at_pure_noise(shift: float) -> None:
    u = torch.arange(1, 1001).double() / 1000
    sigma = shift * u / (1 + (shift - 1) * u)
    log_snr = 2 * ((1 - sigma).log() - sigma.log())
    weight = (log_snr[0] - log_snr)[:-1]
    expected = torch.cat([weight / weight.sum(), torch.zeros(1, dtype=torch.float64)])
    flow = RectifiedFlow(shift=shift)
    torch.testing.assert_close(flow.snr_probabilities(), expected, rtol=1e-4, atol=1e-7)
    t = draws(TimestepConfig(sampler="snr"), noise=flow)
    assert_follows(t // 10, expected.view(100, 10).sum(1))
    assert t.max() < 999


def test_flow_is_drawn_uniformly_and_in_ranges_as_other_processes_are() -> None:
    flow = RectifiedFlow(10)
    assert_follows(draws(TimestepConfig(), noise=flow), torch.full((10,), 0.1))
    assert draws(TimestepConfig(sampler="range", low=2, high=5), noise=flow).unique().tolist() == [2, 3, 4]
