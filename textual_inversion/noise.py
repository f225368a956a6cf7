"""The forward noise process, and what the denoiser is asked for. Only this file tests the prediction type.

Letters as in Ho et al. 2020: `abar_t` is the product of alphas up to t; x_0 latents, eps noise, x_t noisy latents;
SNR(t) = abar_t / (1 - abar_t). `abar` is [batch], one for each sample's timestep.
"""

from __future__ import annotations

from torch import Tensor


def corrupt(latents: Tensor, noise: Tensor, abar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020, Eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps -> (x_t, target), both [batch, ...].

    The target is eps, or Salimans & Ho 2022, appendix D: v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.
    """
    signal, sigma = _levels(abar, latents)
    x_t = signal * latents + sigma * noise
    if prediction_type == "epsilon":
        return x_t, noise
    if prediction_type == "v_prediction":
        return x_t, signal * noise - sigma * latents
    raise _unknown(prediction_type)


def predicted_latents(prediction: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """The x_0 that a prediction at x_t stands for, [batch, ...] each.

    Ho et al. 2020, Eq. 15: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); Salimans & Ho 2022, appendix D:
    sqrt(abar_t) x_t - sqrt(1 - abar_t) v.
    """
    signal, sigma = _levels(abar, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * prediction
    raise _unknown(prediction_type)


def min_snr_weights(abar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Hang et al. 2023, section 3.4: weights of the loss on x_0 of min(SNR, gamma), written for the loss on eps,
    min(SNR, gamma) / SNR, or on v, min(SNR, gamma) / (SNR + 1) -> [batch]."""
    snr = abar / (1 - abar)
    if prediction_type == "epsilon":
        return snr.clamp(max=gamma) / snr
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise _unknown(prediction_type)


def _levels(abar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply [batch, ...]."""
    column = abar.reshape(-1, *[1] * (like.ndim - 1))
    return column.sqrt(), (1 - column).sqrt()


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type {prediction_type!r} is unknown; 'epsilon' and 'v_prediction' are implemented")
