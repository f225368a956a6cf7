"""Draws of the training timesteps of a step's samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from textual_inversion.config import TimestepConfig
from textual_inversion.noise import Noise

DrawTimesteps = Callable[[int, torch.Generator], Tensor]
"""(number of samples, generator) -> timesteps [samples], 64-bit integers on the CPU."""


def timestep_sampler(config: TimestepConfig, noise: Noise) -> DrawTimesteps:
    """Make the sampler that the configuration names for a model's noise process.

    Raises ValueError if the configuration does not go with the process.
    """
    num_timesteps = noise.num_timesteps
    if config.sampler == "uniform":
        return lambda n, generator: uniform(n, 0, num_timesteps, generator)
    if config.sampler == "range":
        low, high = config.low, config.high
        if high > num_timesteps:
            raise ValueError(
                f"timesteps.high = {high}: this model's schedule has {num_timesteps} timesteps; set it to at most that"
            )
        return lambda n, generator: uniform(n, low, high, generator)
    if config.sampler == "logit_normal":
        return lambda n, generator: logit_normal(n, num_timesteps, generator)
    cumulative = noise.snr_probabilities().cumsum(0)
    return lambda n, generator: by_inverse_cdf(n, cumulative, generator)


def uniform(n: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Draw t ~ U{low, ..., high-1} [n]. Gal et al. 2022, Eq. 1, draws from the whole schedule; ZOODiP from [500, 900)
    of 1,000."""
    return torch.randint(low, high, (n,), generator=generator)


def logit_normal(n: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw t = floor(num_timesteps sigmoid(x)) [n], x ~ N(0, 1) (Esser et al. 2024, section 3.1, Eq. 19, "rf/lognorm
    (0.00, 1.00)"). Timesteps of a rectified flow are numbered before its shift, as SD3's were."""
    place = torch.randn(n, generator=generator, dtype=torch.float64).sigmoid()
    return (place * num_timesteps).long().clamp(max=num_timesteps - 1)


def by_inverse_cdf(n: int, cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """Draw t [n] with cumulative[t-1] <= u < cumulative[t], u ~ U[0, 1). Timesteps of probability 0 are never drawn."""
    u = torch.rand(n, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
