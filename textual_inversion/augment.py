"""Augmentation of photos before they are encoded: mirror image, crops, changed colours and TextBoost's paired
augmentation (`paired_augment`). A mask goes through the same geometry as its photo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from textual_inversion.augment_config import AugmentConfig
from textual_inversion.framing import Framing
from textual_inversion.paired_augment import AugmentedPhoto, augment_paired

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in px of the photo."""


def photo_views(
    photo: Image.Image,
    config: AugmentConfig,
    resolution: int,
    generator: torch.Generator,
    mask: Image.Image | None = None,
) -> list[AugmentedPhoto]:
    """Return the square pictures of `resolution` px that are learned from one photo, with their masks.

    The photo's central square comes first (never squashed: the paper's code resizes any shape to a square, which
    distorts), then its mirror image, then the crops and the changed colours, each mirrored with probability 1/2, then
    the paired augmentations. Where there are paired augmentations, a mirror image always carries the token `hflip`, so
    that prompts without this token describe unmirrored pictures only.

    mask: grey, of the photo's size; None for a photo without one.
    """
    whole_photo = AugmentedPhoto(picture=photo, mask=mask)
    square = _square(whole_photo, _central_square(photo), resolution)
    views = [square]
    if config.flip:
        views.append(_mirror(square, config))
    views += _random_crops(whole_photo, config, resolution, generator)
    views += _changed_colours(square, config, generator)
    views += [augment_paired(square, config, generator) for _ in range(config.paired)]
    return views


def to_pixels(picture: Image.Image) -> Tensor:
    """Convert an RGB picture to pixels [3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_weights(mask: Image.Image) -> Tensor:
    """Convert a grey mask to loss weights [1, height, width] in [0, 1]."""
    return torch.from_numpy(np.array(mask))[None].float() / 255


def _random_crops(
    photo: AugmentedPhoto, config: AugmentConfig, resolution: int, generator: torch.Generator
) -> Iterator[AugmentedPhoto]:
    """Yield squares anywhere in the photo, with sides uniform in [min_crop_scale, max_crop_scale] of its shorter
    side."""
    width, height = photo.picture.size
    for _ in range(config.crops):
        scale, x, y, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = min(width, height) * (config.min_crop_scale + scale * (config.max_crop_scale - config.min_crop_scale))
        left, top = x * (width - side), y * (height - side)
        crop = _square(photo, (left, top, left + side, top + side), resolution)
        yield _mirror(crop, config) if config.flip and coin < 0.5 else crop


def _changed_colours(
    square: AugmentedPhoto, config: AugmentConfig, generator: torch.Generator
) -> Iterator[AugmentedPhoto]:
    """Yield pictures with brightness, contrast and saturation multiplied, in this order, by factors uniform in
    1 +- colour_strength."""
    for _ in range(config.colours):
        *numbers, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        picture = square.picture
        for enhance, number in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), numbers, strict=True
        ):
            picture = enhance(picture).enhance(1 + config.colour_strength * (2 * number - 1))
        recoloured = replace(square, picture=picture)
        yield _mirror(recoloured, config) if config.flip and coin < 0.5 else recoloured


def _mirror(view: AugmentedPhoto, config: AugmentConfig) -> AugmentedPhoto:
    mirrored = replace(view.map_images(ImageOps.mirror), framing=view.framing and view.framing.mirrored())
    return mirrored.name("hflip") if config.paired else mirrored


def _central_square(photo: Image.Image) -> Box:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return left, top, left + side, top + side


def _square(photo: AugmentedPhoto, box: Box, resolution: int) -> AugmentedPhoto:
    """Return the box of the photo and of its mask, resized to `resolution` px a side."""
    size = (resolution, resolution)
    return AugmentedPhoto(
        picture=photo.picture.resize(size, Image.Resampling.LANCZOS, box=box),
        mask=photo.mask and photo.mask.resize(size, Image.Resampling.BOX, box=box),
        framing=Framing.of_box(photo.picture.size, box, resolution),
    )
