"""Which timesteps a step trains at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from textual_inversion.config import TimestepConfig

Sampler = Callable[[int, torch.Generator], Tensor]
"""(how many, generator) -> timesteps [n] of 64-bit integers on the CPU."""


def sampler(config: TimestepConfig, alphas_cumprod: Tensor) -> Sampler:
    """The sampler that the configuration names, for a model with this noise schedule [T]. Raises ValueError if they do
    not go together."""
    num_timesteps = len(alphas_cumprod)
    if config.sampler == "uniform":
        return lambda n, generator: uniform(n, 0, num_timesteps, generator)
    if config.sampler == "range":
        low, high = config.low, config.high
        if high > num_timesteps:
            raise ValueError(
                f"timesteps.high = {high}: this model's schedule has {num_timesteps} timesteps; set it to at most that"
            )
        return lambda n, generator: uniform(n, low, high, generator)
    cumulative = snr_probabilities(alphas_cumprod.cpu()).cumsum(0)
    return lambda n, generator: by_inverse_cdf(n, cumulative, generator)


def uniform(n: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """t ~ U{low, ..., high-1}. Gal et al. 2022, Eq. 1, has the whole schedule; [500, 900) of 1,000 is ZOODiP's."""
    return torch.randint(low, high, (n,), generator=generator)


def snr_probabilities(alphas_cumprod: Tensor) -> Tensor:
    """TextBoost (Park et al. 2024, v1): p(t) proportional to max_s log SNR(s) - log SNR(t), with
    SNR(t) = abar_t / (1 - abar_t) -> [T] float64. Its released code never turns this on."""
    abar = alphas_cumprod.double()
    if not ((abar > 0) & (abar < 1)).all():
        raise ValueError(
            "timesteps.sampler 'snr' needs noise and signal at every timestep; this model's schedule has one without "
            "(zero terminal SNR?): use 'range'"
        )
    log_snr = abar.log() - (1 - abar).log()
    weight = log_snr.max() - log_snr
    return weight / weight.sum()


def by_inverse_cdf(n: int, cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """t with cumulative[t-1] <= u < cumulative[t], u ~ U[0, 1)."""
    u = torch.rand(n, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
