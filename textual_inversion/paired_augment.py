"""TextBoost's paired augmentation (Park et al. 2024, v1): transforms of a photo that the photo's prompt names.

A transform that acts adds its augmentation token to the prompt ("A* photo of V*"), so the token's row learns the
transform and the concept's rows do not; prompts for drawing leave the tokens out. The operations are pure functions of
a picture and its mask; `augment_paired` draws which of them act.

There are two sets, as the authors' code had them at two times. Line numbers are those of `paired_augmentation.py`.

- `release`: JMaiGC/textboost a806fda (13 September 2024), training/augment, lines 318-333 and 372-388. Geometry: zoom,
  vertical flip, crop, shift. Colour: grey, brightness. Other: cutout, grid of 2 x 2 or 4 x 4. The mirror image is not
  among them: the code appends it to a list that it does not use (lines 354-355), so its token is there and untrained.
- `late`: nahyeonkaty/textboost 0390854 (24 January 2025), textboost/augment, lines 286-298, 314-316 and 333-349.
  Geometry: zoom, crop, shift, mirror image. Other: collage of 2 x 2 or 3 x 3 with black edges. Colour: grey, with
  probability 0.2. Tokens of the mirror image and of the shifts start from rare words.

The code names a shift to the right by its first token three times, and the late code names shifts by strings that are
not the tokens it trains; here one function returns a transformed picture together with its token. A token of several
initial words has one row here and a row for each word there (`initialise.augmentation_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from textual_inversion.augment_config import AugmentConfig, TransformSet
from textual_inversion.framing import Framing

_DRAWS_PER_GROUP = 6
"""Random numbers drawn for each group: one for whether it acts, one for which operation, four for the operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Names of the transforms of a picture, by where its prompt names them."""

    before: tuple[str, ...] = ()
    """Names of the tokens in front of the prompt, in their order there."""
    after: tuple[str, ...] = ()
    """Names of the tokens behind the prompt."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the prompt."""
        return self.before + self.after


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentedPhoto:
    """A photo after some transforms, with the mask after the same geometry and the tokens that name the transforms."""

    picture: Image.Image
    """RGB picture."""
    mask: Image.Image | None = None
    """Grey mask of the picture's size, white where the concept is; None for a photo without a mask."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Transforms that the prompt has to name, keys of the set's tokens."""
    framing: Framing | None = None
    """Part of the photo that a square picture shows, before the transforms the prompt names; None for all of it."""

    def map_images(self, transform: Callable[[Image.Image], Image.Image]) -> AugmentedPhoto:
        """Return the photo with the transform applied to its picture and to its mask."""
        return replace(self, picture=transform(self.picture), mask=self.mask and transform(self.mask))

    def name(self, name: str, *, after: bool = False) -> AugmentedPhoto:
        """Return the photo with this token in front of all others, or with `after` behind all others."""
        named = self.augmentation
        if after:
            return replace(self, augmentation=replace(named, after=(*named.after, name)))
        return replace(self, augmentation=replace(named, before=(name, *named.before)))


def rescale(photo: AugmentedPhoto, factor: float) -> AugmentedPhoto:
    """Zoom about the centre by the factor, at the same size in pixels.

    A factor below 1 leaves a border: the picture's edge pixels are repeated there, and the mask is black.
    """
    width, height = photo.picture.size
    if factor >= 1:
        across, down = (1 - 1 / factor) * width / 2, (1 - 1 / factor) * height / 2
        return photo.map_images(lambda image: _resize(image, (across, down, width - across, height - down)))
    inner = max(1, round(width * factor)), max(1, round(height * factor))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    border = (top, height - inner[1] - top), (left, width - inner[0] - left)
    return photo.map_images(lambda image: _pad(image.resize(inner, _FILTER[image.mode]), border))


def crop(photo: AugmentedPhoto, side: float, x: float, y: float) -> AugmentedPhoto:
    """Enlarge a crop to the photo's size.

    `side` is the crop's side as a fraction of the photo's; (x, y) in [0, 1] places it within the room that is left.
    """
    width, height = photo.picture.size
    left, top = x * (1 - side) * width, y * (1 - side) * height
    return photo.map_images(lambda image: _resize(image, (left, top, left + side * width, top + side * height)))


def shift(photo: AugmentedPhoto, fraction: float) -> AugmentedPhoto:
    """Move the photo to the right by a fraction of its width, to the left if the fraction is negative.

    The uncovered border repeats the picture's edge pixels; the mask is black there.
    """
    by_px = round(fraction * photo.picture.width)

    def move(image: Image.Image) -> Image.Image:
        kept = image.crop((max(0, -by_px), 0, image.width - max(0, by_px), image.height))
        return _pad(kept, ((0, 0), (max(0, by_px), max(0, -by_px))))

    return photo.map_images(move)


def grayscale(photo: AugmentedPhoto) -> AugmentedPhoto:
    """Remove the picture's colour."""
    return replace(photo, picture=ImageOps.grayscale(photo.picture).convert("RGB"))


def brightness(photo: AugmentedPhoto, factor: float) -> AugmentedPhoto:
    """Multiply every value of the picture by the factor."""
    return replace(photo, picture=ImageEnhance.Brightness(photo.picture).enhance(factor))


def cutout(photo: AugmentedPhoto, side: float, x: float, y: float) -> AugmentedPhoto:
    """Cover a rectangle with black, in the picture and in the mask. `side`, `x` and `y` are those of `crop`."""
    width, height = photo.picture.size
    left, top = round(x * (1 - side) * width), round(y * (1 - side) * height)
    hole = (left, top, left + round(side * width), top + round(side * height))

    def cover(image: Image.Image) -> Image.Image:
        image = image.copy()
        image.paste(0, hole)
        return image

    return photo.map_images(cover)


def grid(photo: AugmentedPhoto, tiles: int, *, black_edges: bool = False) -> AugmentedPhoto:
    """Fill the photo with `tiles` x `tiles` small copies of itself; with `black_edges` each has an edge of 1 px."""

    def tile(image: Image.Image) -> Image.Image:
        small = np.array(image.resize((-(-image.width // tiles), -(-image.height // tiles)), _FILTER[image.mode]))
        if black_edges:
            small[[0, -1]] = 0
            small[:, [0, -1]] = 0
        shape = (tiles, tiles) + (1,) * (image.mode == "RGB")
        return Image.fromarray(np.tile(small, shape)[: image.height, : image.width])

    return photo.map_images(tile)


def augmentation_tokens(config: AugmentConfig) -> Mapping[str, str]:
    """Return the tokens of the configured set, name -> the words that its row starts from; none without `paired`."""
    return TRANSFORM_SETS[config.paired_set].tokens if config.paired else {}


def augment_paired(photo: AugmentedPhoto, config: AugmentConfig, generator: torch.Generator) -> AugmentedPhoto:
    """Let each group of operations of `config.paired_set` act with its probability, one after the other.

    A group acts by one of its operations, drawn evenly, which adds its token. The number of draws from the generator
    is always the same.
    """
    for group in TRANSFORM_SETS[config.paired_set].groups:
        coin, choice, *numbers = torch.rand(_DRAWS_PER_GROUP, generator=generator, dtype=torch.float64).tolist()
        if coin < (group.probability or config.paired_probability):
            photo = group.operations[int(choice * len(group.operations))](photo, numbers)
    return photo


# Operations with their tokens: (photo, four numbers uniform in [0, 1)) -> the transformed photo. A token whose place
# the code draws stands in front of the prompt or behind it with equal probability.

_Operation = Callable[[AugmentedPhoto, Sequence[float]], AugmentedPhoto]


def _zoom(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    """Zoom by a factor in [0.34, 1.4). Factors from 0.6 to 1.2 change too little to be named and add no token."""
    factor = _between(0.34, 1.4, numbers[0])
    zoomed = rescale(photo, factor)
    if 0.6 <= factor <= 1.2:
        return zoomed
    return zoomed.name("zoom-out" if factor < 0.6 else "zoom-in")


def _crop(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    """Crop to an area uniform in [0.08, 1) of the picture's."""
    side = math.sqrt(_between(0.08, 1.0, numbers[0]))
    return crop(photo, side, numbers[1], numbers[2]).name("crop", after=numbers[3] >= 0.5)


def _shift(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    fraction = _between(0.15, 0.3, numbers[0])
    if numbers[1] < 0.5:
        return shift(photo, -fraction).name("left", after=True)
    return shift(photo, fraction).name("right", after=True)


def _hflip(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return photo.map_images(ImageOps.mirror).name("hflip", after=numbers[0] >= 0.5)


def _vflip(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return photo.map_images(ImageOps.flip).name("vflip", after=numbers[0] >= 0.5)


def _grayscale(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return grayscale(photo).name("grayscale", after=numbers[0] >= 0.5)


def _grayscale_late(photo: AugmentedPhoto, _numbers: Sequence[float]) -> AugmentedPhoto:
    return grayscale(photo).name("grayscale", after=True)


def _brightness(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    is_dimmed = numbers[0] < 0.5
    factor = _between(0.4, 0.6, numbers[1]) if is_dimmed else _between(1.3, 1.5, numbers[1])
    return brightness(photo, factor).name("dimmed" if is_dimmed else "bright", after=numbers[2] >= 0.5)


def _cutout(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    covered = cutout(photo, _between(0.1, 0.33, numbers[0]), numbers[1], numbers[2])
    return covered.name("cutout", after=numbers[3] >= 0.5)


def _grid(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return grid(photo, 2 if numbers[0] < 0.5 else 4).name("grid")


def _collage(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return grid(photo, 2 if numbers[0] < 0.5 else 3, black_edges=True).name("collage")


@dataclass(frozen=True, slots=True)
class _Group:
    """Operations of which at most one acts on a picture."""

    operations: tuple[_Operation, ...]
    probability: float = 0.0
    """Probability with which one of them acts; 0 stands for `augment.paired_probability`."""


@dataclass(frozen=True, slots=True)
class _Transforms:
    """Transforms and tokens of one version of the authors' code."""

    tokens: Mapping[str, str]
    """Name of each augmentation token -> the word or words that its row starts from."""
    groups: tuple[_Group, ...]
    """Groups of operations, in the order in which they act."""


TRANSFORM_SETS: Mapping[TransformSet, _Transforms] = {
    "release": _Transforms(
        tokens={
            "grayscale": "gray",
            "zoom-in": "zoom in",
            "zoom-out": "far away",
            "bright": "bright",
            "dimmed": "dark",
            "hflip": "flip",
            "vflip": "flip",
            "crop": "crop",
            "cutout": "hole",
            "left": "on the left",
            "right": "on the right",
            "grid": "grid of",
        },  # training/utils.py:241-254
        groups=(_Group((_zoom, _vflip, _crop, _shift)), _Group((_grayscale, _brightness)), _Group((_cutout, _grid))),
    ),
    "late": _Transforms(
        tokens={
            "grayscale": "grayscale",
            "zoom-in": "zoom in",
            "zoom-out": "far away",
            "collage": "photo collage",
            "crop": "crop",
            "hflip": "ktn",
            "left": "pll",
            "right": "ucd",
        },  # textboost/utils.py:180-189
        groups=(_Group((_zoom, _crop, _shift, _hflip)), _Group((_collage,)), _Group((_grayscale_late,), 0.2)),
    ),
}
"""Set of transforms, as `augment.paired_set` names it -> its tokens and operations."""

_FILTER = {"RGB": Image.Resampling.LANCZOS, "L": Image.Resampling.BOX}


def _between(low: float, high: float, number: float) -> float:
    return low + (high - low) * number


def _resize(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Return the box (left, top, right, bottom) of the image, resized to the whole image's size."""
    return image.resize(image.size, _FILTER[image.mode], box=box)


def _pad(image: Image.Image, border: tuple[tuple[int, int], tuple[int, int]]) -> Image.Image:
    """Add a border, ((above, below), (left, right)) px: a picture's edge pixels repeated, black around a mask."""
    if image.mode == "RGB":
        return Image.fromarray(np.pad(np.asarray(image), (*border, (0, 0)), "edge"))
    return Image.fromarray(np.pad(np.asarray(image), border))
