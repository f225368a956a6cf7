"""Views of the demo world: what the paired augmentation of TextBoost does to a photo, with words that say so.

The operations are those of `textual_inversion.paired_augment`, so the world shows what the method shows. A view with
a word of its own is plainly visible; a mild one belongs to the neutral templates' adjectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageOps

from textual_inversion import paired_augment
from textual_inversion.paired_augment import AugmentedPhoto

_Operation = Callable[[AugmentedPhoto, np.random.Generator], AugmentedPhoto]


def _rescale(low: float, high: float) -> _Operation:
    return lambda photo, rng: paired_augment.rescale(photo, rng.uniform(low, high))


def _crop(low: float, high: float) -> _Operation:
    return lambda photo, rng: paired_augment.crop(photo, rng.uniform(low, high), rng.random(), rng.random())


def _shift(low: float, high: float) -> _Operation:
    return lambda photo, rng: paired_augment.shift(photo, rng.uniform(low, high))


def _brightness(low: float, high: float) -> _Operation:
    return lambda photo, rng: paired_augment.brightness(photo, rng.uniform(low, high))


GEOMETRY_VIEWS: Mapping[str, _Operation] = {
    "zoom-in": _rescale(1.25, 1.6),
    "zoom-out": _rescale(0.34, 0.6),
    "crop": _crop(0.35, 0.8),
    "left": _shift(-0.3, -0.15),
    "right": _shift(0.15, 0.3),
    "hflip": lambda photo, _: photo.map_images(ImageOps.mirror),
    "vflip": lambda photo, _: photo.map_images(ImageOps.flip),
}
COLOUR_VIEWS: Mapping[str, _Operation] = {
    "grayscale": lambda photo, _: paired_augment.grayscale(photo),
    "bright": _brightness(1.3, 1.5),
    "dimmed": _brightness(0.4, 0.6),
}
OTHER_VIEWS: Mapping[str, _Operation] = {
    "cutout": lambda photo, rng: paired_augment.cutout(photo, rng.uniform(0.1, 0.35), rng.random(), rng.random()),
    "grid": lambda photo, rng: paired_augment.grid(photo, int(rng.choice((2, 3, 4), p=(0.5, 0.1, 0.4)))),
}
VIEWS: Mapping[str, _Operation] = {**GEOMETRY_VIEWS, **COLOUR_VIEWS, **OTHER_VIEWS}
MILD_VIEWS: Mapping[str, _Operation] = {
    "zoom-in": _rescale(1.1, 1.25),
    "crop": _crop(0.8, 0.92),
    "bright": _brightness(1.15, 1.3),
    "dimmed": _brightness(0.65, 0.8),
}
BORDER_VIEWS = frozenset({"zoom-out", "left", "right"})
"""Views that uncover a border, where the edge pixels are repeated: drawn over flat backgrounds only, which hide it."""


def apply_views(
    picture: Image.Image, views: tuple[str, ...], *, is_mild: bool, rng: np.random.Generator
) -> Image.Image:
    """Show the picture in the views, one after the other."""
    photo = AugmentedPhoto(picture=picture)
    for view in views:
        photo = (MILD_VIEWS if is_mild else VIEWS)[view](photo, rng)
    return photo.picture
