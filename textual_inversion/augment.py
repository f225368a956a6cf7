"""The views of a photo that a concept is learned from: the whole photo, its mirror image, crops, changed colours, and
TextBoost's paired augmentation. A mask goes through the same geometry as its photo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from textual_inversion.config import AugmentConfig
from textual_inversion.paired_augment import View, augment_paired

Box = tuple[float, float, float, float]


def views(
    photo: Image.Image,
    config: AugmentConfig,
    resolution: int,
    generator: torch.Generator,
    mask: Image.Image | None = None,
) -> list[View]:
    """One photo as square pictures of `resolution` px, with its mask of the photo's size if it has one.

    The photo's central square comes first (never squashed: the paper's code resizes any shape to a square, which
    distorts), then its mirror image, then the crops and the changed colours, each mirrored by chance, then the paired
    views. Beside paired views a mirror image has its token, too: `hflip` alone is to mean that.
    """
    photographed = View(picture=photo, mask=mask)
    whole = _square(photographed, _centre(photo), resolution)
    shown = [whole]
    if config.flip:
        shown.append(_mirrored(whole, config))
    shown += _crops(photographed, config, resolution, generator)
    shown += _colours(whole, config, generator)
    shown += [augment_paired(whole, config.paired_probability, generator) for _ in range(config.paired)]
    return shown


def to_pixels(picture: Image.Image) -> Tensor:
    """RGB picture -> [3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_weights(mask: Image.Image) -> Tensor:
    """Grey picture -> [1, height, width] in [0, 1]."""
    return torch.from_numpy(np.array(mask))[None].float() / 255


def _crops(photo: View, config: AugmentConfig, resolution: int, generator: torch.Generator) -> Iterator[View]:
    """Squares anywhere in the photo, with sides uniform in [min_crop_scale, 1] of its shorter side."""
    width, height = photo.picture.size
    for _ in range(config.crops):
        scale, x, y, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = min(width, height) * (config.min_crop_scale + scale * (1 - config.min_crop_scale))
        left, top = x * (width - side), y * (height - side)
        crop = _square(photo, (left, top, left + side, top + side), resolution)
        yield _mirrored(crop, config) if config.flip and coin < 0.5 else crop


def _colours(whole: View, config: AugmentConfig, generator: torch.Generator) -> Iterator[View]:
    """Brightness, contrast and saturation, one after the other, each times a factor uniform in 1 +- strength."""
    for _ in range(config.colours):
        *numbers, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        picture = whole.picture
        for enhance, number in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), numbers, strict=True
        ):
            picture = enhance(picture).enhance(1 + config.colour_strength * (2 * number - 1))
        changed = replace(whole, picture=picture)
        yield _mirrored(changed, config) if config.flip and coin < 0.5 else changed


def _mirrored(view: View, config: AugmentConfig) -> View:
    mirrored = view.each(ImageOps.mirror)
    return mirrored.named("hflip") if config.paired else mirrored


def _centre(photo: Image.Image) -> Box:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return left, top, left + side, top + side


def _square(view: View, box: Box, resolution: int) -> View:
    size = (resolution, resolution)
    return View(
        picture=view.picture.resize(size, Image.Resampling.LANCZOS, box=box),
        mask=view.mask and view.mask.resize(size, Image.Resampling.BOX, box=box),
    )
