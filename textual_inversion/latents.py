"""Encode each view of a concept's photos once, and sample latents from the cached moments at every step.

A view is a photo or an augmentation of it, as a square picture (`augment.photo_views`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion.augment import photo_views, to_pixels, to_weights
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.paired_augment import Augmentation
from textual_inversion.rng import generator_for
from textual_inversion.transfer import to_device

AUTOENCODER_BATCH_SIZE = 4
"""Pictures in one forward pass of the autoencoder, which bounds its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedViews:
    """A concept's views, encoded."""

    moments: Tensor
    """Mean and deviation of each view's latents, [views, 2, *latent_shape]."""
    photo_indices: tuple[int, ...]
    """Index of the photo that each view shows, [views]."""
    augmentations: tuple[Augmentation, ...]
    """Transforms that each view's prompt has to name, [views]; none without paired augmentation."""
    masks: Tensor | None = None
    """Weights of the denoising loss, [views, 1, height, width] in [0, 1] at the latents' size; None weighs by 1."""
    framings: Tensor | None = None
    """Height and width of each view's photo and the top left corner of what the view shows, [views, 4] float32, px
    (`Framing.numbers`); None stands for whole photos of the model's resolution."""

    def __len__(self) -> int:
        return len(self.moments)


def encode_views(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    config: AugmentConfig,
    concept_id: str,
    seed: int,
    masks: Sequence[Image.Image] = (),
) -> EncodedViews:
    """Encode all views of a concept's photos; the moments are on the backbone's device.

    The result depends on the concept, the settings and the seed alone, so that a concept can be encoded anywhere, at
    any time. A view that shows less of the concept than one latent pixel teaches nothing about it and is left out.

    masks: none, or one of each picture's size (`photos.open_mask`).
    Raises BadInput if there are no pictures, or if no view is left.
    """
    if not pictures:
        raise BadInput(f"concept {concept_id!r} has no pictures to encode")
    generator = generator_for(seed, concept_id, "views")
    mask_of = dict(enumerate(masks))
    views = [
        (index, view)
        for index, picture in enumerate(pictures)
        for view in photo_views(picture, config, backbone.resolution, generator, mask_of.get(index))
    ]
    weights = None
    if masks:
        full_size = torch.stack([to_weights(view.mask) for _, view in views if view.mask])
        weights = F.adaptive_avg_pool2d(full_size, backbone.latent_shape[1:])  # the mean over each latent pixel's area
        is_shown = weights.sum((1, 2, 3)) >= 1
        views = [view for view, keep in zip(views, is_shown.tolist(), strict=True) if keep]
        weights = weights[is_shown]
    if not views:
        raise BadInput(
            f"concept {concept_id!r}: its masks show nothing of it in the photos' central squares; crop the photos and "
            "masks around it"
        )
    pixels = torch.stack([to_pixels(view.picture) for _, view in views])
    with torch.no_grad():
        moments = torch.cat(
            [
                backbone.encode_images(to_device(batch, backbone.device))
                for batch in torch.split(pixels, AUTOENCODER_BATCH_SIZE)
            ]
        )
    return EncodedViews(
        moments=moments,
        photo_indices=tuple(index for index, _ in views),
        augmentations=tuple(view.augmentation for _, view in views),
        masks=weights,
        framings=torch.tensor([view.framing.numbers() for _, view in views if view.framing], dtype=torch.float32),
    )


def sample_latents(moments: Tensor, eps: Tensor) -> Tensor:
    """Rombach et al. 2022, appendix G: sample latents z ~ E(x) from an image's moments, [batch, *latent_shape].

    moments: [batch, 2, *latent_shape]. eps: [batch, *latent_shape] ~ N(0, 1).
    """
    mean, deviation = moments.unbind(1)
    return mean + deviation * eps
