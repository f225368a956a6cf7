"""Latents: each view of a concept's photos is encoded once, and sampled from its cached moments at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from textual_inversion.augment import views
from textual_inversion.config import AugmentConfig
from textual_inversion.families.base import Backbone
from textual_inversion.rng import generator_for

VIEWS_PER_PASS = 4
"""Views encoded together; bounds the autoencoder's memory."""


def encode_views(
    backbone: Backbone, pictures: Sequence[Image.Image], config: AugmentConfig, concept_id: str, seed: int
) -> Tensor:
    """All views of a concept's pictures -> moments [views, 2, *latent_shape] (mean, deviation) on the backbone's
    device. Depends on the concept alone, so it can run anywhere, while others are being learned."""
    if not pictures:
        raise ValueError(f"concept {concept_id!r} has no pictures to encode")
    generator = generator_for(seed, concept_id, "views")
    pixels = torch.cat([views(picture, config, backbone.resolution, generator) for picture in pictures])
    with torch.no_grad():
        return torch.cat(
            [backbone.encode_images(part.to(backbone.device)) for part in torch.split(pixels, VIEWS_PER_PASS)]
        )


def sample(moments: Tensor, eps: Tensor) -> Tensor:
    """z ~ E(x) (Rombach et al. 2022, appendix G): moments [batch, 2, *latent_shape], eps [batch, *latent_shape]
    ~ N(0, 1) -> latents [batch, *latent_shape]."""
    mean, deviation = moments.unbind(1)
    return mean + deviation * eps
