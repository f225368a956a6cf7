"""The forward noise process, and what the denoiser is asked for. Only this file tests the prediction type.

Letters as in Ho et al. 2020: `abar_t` is the product of alphas up to t; x_0 latents, eps noise, x_t noisy latents.
"""

from __future__ import annotations

from torch import Tensor


def corrupt(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020, Eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps -> (x_t, target), both [batch, ...].

    The target is eps, or Salimans & Ho 2022, appendix D: v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.
    """
    abar = alphas_cumprod[timesteps].reshape(-1, *[1] * (latents.ndim - 1))
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    x_t = signal * latents + sigma * noise
    if prediction_type == "epsilon":
        return x_t, noise
    if prediction_type == "v_prediction":
        return x_t, signal * noise - sigma * latents
    raise ValueError(f"prediction_type {prediction_type!r} is unknown; 'epsilon' and 'v_prediction' are implemented")
