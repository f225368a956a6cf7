"""The objective as a sum of terms: each is computed per sample, and reduced to one value per concept in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.config import GradientPath, PenaltyConfig
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import FrozenPrompts, concatenate_frozen
from textual_inversion.lora import AdapterBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of several concepts, an equal number of each, in concept order; all on the backbone's device."""

    latents: Tensor
    """Clean latents, [batch, *latent_shape]."""
    noise: Tensor
    """Standard normal noise, [batch, *latent_shape]."""
    timesteps: Tensor
    """Training timesteps, [batch] integers."""
    ids: Mapping[str, Tensor]
    """Text encoder key -> prompts [batch, length], in which id `size + i` of the vocabulary reads row i."""
    mask: Tensor | None = None
    """Weights of the denoising loss in [0, 1], [batch, 1, height, width]; None is 1 everywhere."""
    features: Tensor | None = None
    """Image features of the views, [batch, dim], if they are compared."""
    framing: Tensor | None = None
    """Part of its photo that each view shows, [batch, 4] (`EncodedViews.framings`); None for a whole picture."""
    others: FrozenPrompts | None = None
    """Prompts without the concept, of knowledge preservation, [batch]."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.latents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The parameters of a pass's concepts and what the penalties hold them to: each [concepts, rows, dim], by text
    encoder key."""

    rows: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    """The rows before the first step."""
    class_vector: Mapping[str, Tensor]
    """The mean of the initializer's vectors, [concepts, 1, dim]."""
    is_placeholder_row: Tensor
    """1 for the placeholder's rows that prompts use, 0 for all others, [concepts, rows]."""
    adapters: Sequence[AdapterBatch] = ()


def concatenate_batches(samples: Sequence[Batch], vocab_sizes: Mapping[str, int], rows_per_concept: int) -> Batch:
    """Concatenate several concepts' samples into one batch.

    The i-th concept's row ids are shifted to where its rows lie in the pass. `vocab_sizes`: text encoder key -> size
    of its vocabulary.
    """
    ids = {
        key: torch.cat([_shifted(batch.ids[key], size, i * rows_per_concept) for i, batch in enumerate(samples)])
        for key, size in vocab_sizes.items()
    }
    masks = None
    if any(batch.mask is not None for batch in samples):
        masks = [torch.ones_like(batch.latents[:, :1]) if batch.mask is None else batch.mask for batch in samples]
    features = [batch.features for batch in samples if batch.features is not None]
    framings = [batch.framing for batch in samples if batch.framing is not None]
    others = [batch.others for batch in samples if batch.others is not None]
    return Batch(
        latents=torch.cat([batch.latents for batch in samples]),
        noise=torch.cat([batch.noise for batch in samples]),
        timesteps=torch.cat([batch.timesteps for batch in samples]),
        ids=ids,
        mask=None if masks is None else torch.cat(masks),
        features=torch.cat(features) if features else None,
        framing=torch.cat(framings) if framings else None,
        others=concatenate_frozen(others) if others else None,
    )


def _shifted(ids: Tensor, vocab_size: int, by: int) -> Tensor:
    """Add `by` to the row ids among ids [batch, length]."""
    return torch.where(ids >= vocab_size, ids + by, ids)


def objective(
    backbone: Backbone,
    batch: Batch,
    trained: Trained,
    penalties: PenaltyConfig,
    *,
    gradient_path: GradientPath = "whole",
    min_snr_gamma: float = 0.0,
    image_features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute every term of the objective, weighted, per sample: name -> [batch] float32. Terms of weight 0 are left
    out."""
    noise = backbone.noise
    x_t, target = noise.corrupt(batch.latents, batch.noise, batch.timesteps)
    rows = {key: tensor.flatten(0, 1) for key, tensor in trained.rows.items()}
    conditioning = backbone.encode_prompts(batch.ids, rows, trained.adapters).framed(batch.framing)
    conditioning = replace(conditioning, gradient_path=gradient_path)
    prediction = backbone.predict(x_t, noise.model_timesteps(batch.timesteps), conditioning)

    terms = {"denoising": denoising(prediction, target, batch.mask)}
    if min_snr_gamma:
        terms["denoising"] = terms["denoising"] * noise.min_snr_weights(batch.timesteps, min_snr_gamma)
    if penalties.clip and image_features is not None and batch.features is not None:
        x_0 = noise.predicted_latents(prediction, x_t, batch.timesteps)
        terms["clip"] = penalties.clip * cosine_distance(image_features(backbone.decode(x_0)), batch.features)

    if penalties.knowledge and batch.others is not None:
        # these prompts read none of the rows; without rows, the token table would check that and wait for the device
        adapted = backbone.encode_prompts(batch.others.ids, rows, trained.adapters)
        terms["knowledge"] = penalties.knowledge * adapted.cosine_distance(batch.others.conditioning)

    samples_each = len(batch) // len(trained.is_placeholder_row)
    if penalties.class_distance:
        distance = class_distance(trained.rows, trained.class_vector, trained.is_placeholder_row)
        terms["class_distance"] = penalties.class_distance * distance.repeat_interleave(samples_each)
    if penalties.start_distance:
        distance = start_distance(trained.rows, trained.start, trained.is_placeholder_row)
        terms["start_distance"] = penalties.start_distance * distance.repeat_interleave(samples_each)
    return terms


def denoising(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the denoiser's squared error, mean over a sample's elements, [batch] float32 (Gal et al. 2022, Eq. 2).

    With a mask [batch, 1, height, width], the mean is over what it shows (Kumari et al. 2023, "Custom Diffusion", whose
    code divides by the area but not by the channels; so a mask that shows all changes nothing here). A mask that shows
    nothing gives 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    seen = mask.expand_as(error)
    return (seen * error).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=torch.finfo(error.dtype).tiny)


def class_distance(rows: Mapping[str, Tensor], class_vector: Mapping[str, Tensor], counts: Tensor) -> Tensor:
    """Return ||v - c||^2, mean over a concept's rows and summed over text encoders, [concepts].

    Gal et al. 2022, section 5, "regularised". The released code takes the mean of all k x k products
    (v_i - c)(v_j - c), in which opposite displacements cancel; for one row both are the same. `counts`: [concepts,
    rows] 1 for rows that count, else 0.
    """
    squares = ((tensor - class_vector[key]).square().sum(-1) for key, tensor in rows.items())
    return _mean_over_rows(sum(squares, torch.zeros_like(counts)), counts)


def start_distance(rows: Mapping[str, Tensor], start: Mapping[str, Tensor], counts: Tensor) -> Tensor:
    """Return ||v - v_0||, not squared, mean over a concept's rows and summed over text encoders, [concepts].

    Pang et al. 2024, "Cross Initialization". The gradient at v_0 is taken as zero. `counts`: [concepts, rows] 1 for
    rows that count, else 0.
    """
    norms = (torch.linalg.vector_norm(rows[key] - start[key], dim=-1) for key in rows)
    return _mean_over_rows(sum(norms, torch.zeros_like(counts)), counts)


def row_distance(rows: Mapping[str, Tensor], learned: Mapping[str, Tensor], is_learned: Tensor) -> Tensor:
    """Return ||v - v*||^2 of rows made by a network from rows v* that were learned before, mean over a concept's rows
    and summed over text encoders, [concepts].

    The distance of Ruiz et al. 2023 ("HyperDreamBooth", arXiv 2307.06949) from weights that each concept was optimised
    to beforehand. `learned`: those text encoders alone that learn rows; `is_learned`: [concepts] 1 for concepts that
    have learned rows, 0 for all others, whose distance is 0.
    """
    squares = [(rows[key] - target).square().sum(-1).mean(1) for key, target in learned.items()]
    return is_learned * torch.stack(squares).sum(0)


def cosine_distance(features: Tensor, others: Tensor) -> Tensor:
    """Return 1 - cosine of features [batch, dim] each, [batch]; CLIP-I compares pictures so."""
    return 1 - F.cosine_similarity(features.float(), others.float(), dim=1)


def per_concept(terms: Mapping[str, Tensor], num_concepts: int) -> Tensor:
    """Sum the terms and take the mean over each concept's samples, [num_concepts].

    Losses of concepts are to be *summed*, never averaged: then a concept's gradient is what it would be alone.
    """
    total = sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))
    return total.reshape(num_concepts, -1).mean(1)


def _mean_over_rows(values: Tensor, counts: Tensor) -> Tensor:
    """Take the mean over the rows that count, [concepts]; `values`, `counts`: [concepts, rows]."""
    return (values * counts).sum(1) / counts.sum(1)
