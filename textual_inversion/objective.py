"""The objective as a sum of terms: each is computed per sample, and reduced to one value per concept in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.config import PenaltyConfig
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import distance as knowledge_distance
from textual_inversion.lora import AdapterBatch
from textual_inversion.noise import corrupt, min_snr_weights, predicted_latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of several concepts, an equal number of each, in concept order; all on the backbone's device."""

    latents: Tensor
    """[batch, *latent_shape]"""
    noise: Tensor
    """[batch, *latent_shape]"""
    timesteps: Tensor
    """[batch] integers"""
    ids: Tensor
    """[batch, max_length] prompts, in which id `vocab_size + i` reads row i"""
    mask: Tensor | None = None
    """[batch, 1, height, width] in [0, 1], where the denoising loss counts; None is everywhere"""
    features: Tensor | None = None
    """[batch, dim] image features of the views, if they are compared"""
    other_ids: Tensor | None = None
    """[batch, max_length] prompts without the concept, of knowledge preservation"""
    other_states: Tensor | None = None
    """[batch, max_length, dim] what the text encoder makes of them without adapters"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a pass's concepts have learned so far, and what the penalties hold it to: each [concepts, rows, dim], by
    text encoder key."""

    rows: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    """Where the rows began."""
    class_vector: Mapping[str, Tensor]
    """The mean of the initializer's vectors, [concepts, 1, dim]."""
    own: Tensor
    """[concepts, rows] 1 for the placeholder's rows that prompts use, 0 for all others."""
    adapters: Sequence[AdapterBatch] = ()


def join(samples: Sequence[Batch], vocab_size: int, rows_per_concept: int) -> Batch:
    """One batch of several concepts' samples; the i-th concept's row ids move to where its rows lie in the pass."""
    shifted = [
        replace(part, ids=torch.where(part.ids >= vocab_size, part.ids + i * rows_per_concept, part.ids))
        for i, part in enumerate(samples)
    ]
    if any(part.mask is not None for part in shifted):
        whole = shifted[0].latents[:, :1]
        shifted = [part if part.mask is not None else replace(part, mask=torch.ones_like(whole)) for part in shifted]
    joined: dict[str, Any] = {}
    for entry in fields(Batch):
        values = [getattr(part, entry.name) for part in shifted]
        joined[entry.name] = None if values[0] is None else torch.cat(values)
    return Batch(**joined)


def objective(
    backbone: Backbone,
    batch: Batch,
    trained: Trained,
    penalties: PenaltyConfig,
    *,
    min_snr_gamma: float = 0.0,
    image_features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every term of the objective, weighted, per sample: name -> [batch] float32. A term of weight 0 is not there."""
    abar, prediction_type = backbone.alphas_cumprod[batch.timesteps], backbone.prediction_type
    x_t, target = corrupt(batch.latents, batch.noise, abar, prediction_type)
    rows = {key: tensor.flatten(0, 1) for key, tensor in trained.rows.items()}
    conditioning = backbone.encode_prompts(batch.ids, rows, trained.adapters)
    prediction = backbone.predict(x_t, batch.timesteps, conditioning)

    terms = {"denoising": denoising(prediction, target, batch.mask)}
    if min_snr_gamma:
        terms["denoising"] = terms["denoising"] * min_snr_weights(abar, min_snr_gamma, prediction_type)
    if penalties.clip and image_features is not None and batch.features is not None:
        x_0 = predicted_latents(prediction, x_t, abar, prediction_type)
        terms["clip"] = penalties.clip * cosine_distance(image_features(backbone.decode(x_0)), batch.features)

    if penalties.knowledge and batch.other_ids is not None and batch.other_states is not None:
        # they name none of the rows; without rows, the host would look whether they do, and wait for the device
        states = backbone.encode_prompts(batch.other_ids, rows, trained.adapters).hidden
        terms["knowledge"] = penalties.knowledge * knowledge_distance(states, batch.other_states)

    samples_each = len(batch.latents) // len(trained.own)
    if penalties.class_distance:
        distance = class_distance(trained.rows, trained.class_vector, trained.own)
        terms["class_distance"] = penalties.class_distance * distance.repeat_interleave(samples_each)
    if penalties.start_distance:
        distance = start_distance(trained.rows, trained.start, trained.own)
        terms["start_distance"] = penalties.start_distance * distance.repeat_interleave(samples_each)
    return terms


def denoising(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gal et al. 2022, Eq. 2: squared error of the denoiser, mean over a sample's elements -> [batch] float32.

    With a mask [batch, 1, height, width], the mean over what it shows (Kumari et al. 2023, "Custom Diffusion", whose
    code divides by the area but not by the channels; so a mask that shows all changes nothing here). None shown is 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    seen = mask.expand_as(error)
    return (seen * error).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=torch.finfo(error.dtype).tiny)


def class_distance(rows: Mapping[str, Tensor], class_vector: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """Gal et al. 2022, section 5, "regularised": ||v - c||^2, mean over a concept's rows and summed over text encoders
    -> [concepts]. The released code takes the mean of all k x k products (v_i - c)(v_j - c), in which opposite
    displacements cancel; for one row both are the same."""
    squares = sum(
        ((tensor - class_vector[key]).square().sum(-1) for key, tensor in rows.items()), torch.zeros_like(own)
    )
    return _mean_of(squares, own)


def start_distance(rows: Mapping[str, Tensor], start: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """Pang et al. 2024, "Cross Initialization": ||v - v_0||, not squared, mean over a concept's rows and summed over
    text encoders -> [concepts]. Its gradient at v_0 is taken as zero."""
    norms = sum((torch.linalg.vector_norm(rows[key] - start[key], dim=-1) for key in rows), torch.zeros_like(own))
    return _mean_of(norms, own)


def cosine_distance(features: Tensor, others: Tensor) -> Tensor:
    """1 - cosine, [batch, dim] each -> [batch]; as CLIP-I compares pictures."""
    return 1 - F.cosine_similarity(features.float(), others.float(), dim=1)


def per_concept(terms: Mapping[str, Tensor], num_concepts: int) -> Tensor:
    """Sum of the terms, mean over each concept's samples -> [num_concepts].

    Losses of concepts are to be *summed*, never averaged: then a concept's gradient is what it would be alone.
    """
    total = sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))
    return total.reshape(num_concepts, -1).mean(1)


def _mean_of(values: Tensor, own: Tensor) -> Tensor:
    """[concepts, rows] -> [concepts]"""
    return (values * own).sum(1) / own.sum(1)
