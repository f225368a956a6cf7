"""The views of a photo that a concept is learned from: the whole photo, its mirror image, random crops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from textual_inversion.config import AugmentConfig

Box = tuple[float, float, float, float]


def views(photo: Image.Image, config: AugmentConfig, resolution: int, generator: torch.Generator) -> Tensor:
    """One photo as pixels [views, 3, resolution, resolution] in [-1, 1].

    The photo's central square comes first (never squashed: the paper's code resizes any shape to a square, which
    distorts), then its mirror image, then the crops, each mirrored by chance.
    """
    pictures = [_square(photo, _centre(photo), resolution)]
    if config.flip:
        pictures.append(ImageOps.mirror(pictures[0]))
    pictures += _crops(photo, config, resolution, generator)
    return torch.stack([to_pixels(picture) for picture in pictures])


def to_pixels(picture: Image.Image) -> Tensor:
    """RGB picture -> [3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def _crops(
    photo: Image.Image, config: AugmentConfig, resolution: int, generator: torch.Generator
) -> Iterator[Image.Image]:
    """Squares anywhere in the photo, with sides uniform in [min_crop_scale, 1] of its shorter side."""
    for _ in range(config.crops):
        scale, x, y, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = min(photo.size) * (config.min_crop_scale + scale * (1 - config.min_crop_scale))
        left, top = x * (photo.width - side), y * (photo.height - side)
        crop = _square(photo, (left, top, left + side, top + side), resolution)
        yield ImageOps.mirror(crop) if config.flip and coin < 0.5 else crop


def _centre(photo: Image.Image) -> Box:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return left, top, left + side, top + side


def _square(photo: Image.Image, box: Box, resolution: int) -> Image.Image:
    return photo.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
