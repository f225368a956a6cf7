"""Latents: each view of a concept's photos is encoded once, and sampled from its cached moments at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion.augment import photo_views, to_pixels, to_weights
from textual_inversion.config import AugmentConfig
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.rng import generator_for

VIEWS_PER_PASS = 4
"""Views encoded together; bounds the autoencoder's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What a concept is learned from: its photos as they are and as augmentation shows them, encoded once."""

    moments: Tensor
    """[views, 2, *latent_shape]: mean and deviation."""
    photo: tuple[int, ...]
    """Which of the concept's photos each view shows."""
    augmentation: tuple[tuple[str, ...], ...]
    """Names of the transforms that each view's prompt is to name (`augment.paired`); mostly none."""
    mask: Tensor | None = None
    """[views, 1, height, width] in [0, 1] at the latents' size: where the denoising loss counts."""

    def __len__(self) -> int:
        return len(self.moments)


def encode_views(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    config: AugmentConfig,
    concept_id: str,
    seed: int,
    masks: Sequence[Image.Image] = (),
) -> Views:
    """All views of a concept's pictures, moments on the backbone's device. Depends on the concept alone, so it can
    run anywhere, while others are being learned.

    `masks`: none, or one of each picture's size (`photos.fit_mask`). A view that shows less of the concept than one
    latent pixel teaches nothing about it and is left out; BadInput if no view is left.
    """
    if not pictures:
        raise BadInput(f"concept {concept_id!r} has no pictures to encode")
    generator = generator_for(seed, concept_id, "views")
    mask_of = dict(enumerate(masks))
    shown = [
        (number, view)
        for number, picture in enumerate(pictures)
        for view in photo_views(picture, config, backbone.resolution, generator, mask_of.get(number))
    ]
    weights = None
    if masks:
        every = torch.stack([to_weights(view.mask) for _, view in shown if view.mask])
        weights = F.adaptive_avg_pool2d(every, backbone.latent_shape[1:])  # the mean over each latent pixel's area
        telling = weights.sum((1, 2, 3)) >= 1
        shown = [one for one, tells in zip(shown, telling.tolist(), strict=True) if tells]
        weights = weights[telling]
    if not shown:
        raise BadInput(
            f"concept {concept_id!r}: its masks show nothing of it in the photos' central squares; crop the photos and "
            "masks around it"
        )
    pixels = torch.stack([to_pixels(view.picture) for _, view in shown])
    with torch.no_grad():
        moments = torch.cat(
            [backbone.encode_images(part.to(backbone.device)) for part in torch.split(pixels, VIEWS_PER_PASS)]
        )
    return Views(
        moments=moments,
        photo=tuple(number for number, _ in shown),
        augmentation=tuple(view.augmentation for _, view in shown),
        mask=weights,
    )


def sample(moments: Tensor, eps: Tensor) -> Tensor:
    """z ~ E(x) (Rombach et al. 2022, appendix G): moments [batch, 2, *latent_shape], eps [batch, *latent_shape]
    ~ N(0, 1) -> latents [batch, *latent_shape]."""
    mean, deviation = moments.unbind(1)
    return mean + deviation * eps
