"""Latents: each view of a concept's photos is encoded once, and sampled from its cached moments at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from textual_inversion.augment import views
from textual_inversion.config import AugmentConfig
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
    backbone: Backbone, pictures: Sequence[Image.Image], config: AugmentConfig, concept_id: str, seed: int
) -> Views:
    """All views of a concept's pictures, moments on the backbone's device. Depends on the concept alone, so it can
    run anywhere, while others are being learned."""
    if not pictures:
        raise ValueError(f"concept {concept_id!r} has no pictures to encode")
    generator = generator_for(seed, concept_id, "views")
    parts = [views(picture, config, backbone.resolution, generator) for picture in pictures]
    pixels = torch.cat(parts)
    with torch.no_grad():
        moments = torch.cat(
            [backbone.encode_images(part.to(backbone.device)) for part in torch.split(pixels, VIEWS_PER_PASS)]
        )
    photo = tuple(number for number, part in enumerate(parts) for _ in part)
    return Views(moments=moments, photo=photo, augmentation=((),) * len(photo))


def sample(moments: Tensor, eps: Tensor) -> Tensor:
    """z ~ E(x) (Rombach et al. 2022, appendix G): moments [batch, 2, *latent_shape], eps [batch, *latent_shape]
    ~ N(0, 1) -> latents [batch, *latent_shape]."""
    mean, deviation = moments.unbind(1)
    return mean + deviation * eps
