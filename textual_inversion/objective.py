"""The objective as a sum of terms: each is computed per sample, and reduced to one value per concept in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from textual_inversion.families.base import Backbone
from textual_inversion.noise import corrupt


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of several concepts, an equal number of each, in concept order; all on the backbone's device."""

    latents: Tensor
    """[batch, *latent_shape]"""
    noise: Tensor
    """[batch, *latent_shape]"""
    timesteps: Tensor
    """[batch] integers"""
    weight: Tensor
    """[batch] of each sample's denoising loss"""
    ids: Tensor
    """[batch, max_length] prompts, in which id `vocab_size + i` reads row i"""


def objective(backbone: Backbone, batch: Batch, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every term of the objective, per sample: name -> [batch] float32. `rows`: text encoder key -> [num_rows, dim]."""
    x_t, target = corrupt(
        batch.latents, batch.noise, batch.timesteps, backbone.alphas_cumprod, backbone.prediction_type
    )
    conditioning = backbone.encode_prompts(batch.ids, rows)
    prediction = backbone.predict(x_t, batch.timesteps, conditioning)
    return {"denoising": batch.weight * denoising(prediction, target)}


def denoising(prediction: Tensor, target: Tensor) -> Tensor:
    """Gal et al. 2022, Eq. 2: squared error of the denoiser, mean over a sample's elements -> [batch] float32."""
    error: Tensor = prediction.float() - target.float()
    return error.square().flatten(1).mean(1)


def per_concept(terms: Mapping[str, Tensor], num_concepts: int) -> Tensor:
    """Sum of the terms, mean over each concept's samples -> [num_concepts].

    Losses of concepts are to be *summed*, never averaged: then a concept's gradient is what it would be alone.
    """
    total = sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))
    return total.reshape(num_concepts, -1).mean(1)
