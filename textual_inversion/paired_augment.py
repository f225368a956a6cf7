"""TextBoost's paired augmentation (Park et al. 2024, v1): transforms of a photo that the photo's prompt names.

A transform that acts adds its augmentation token to the prompt ("a A* photo of V*"), so the token's row learns the
transform and the concept's rows do not; prompts for drawing leave the tokens out. The operations are pure functions of
a picture and its mask; `augment_paired` draws which of them act. The released code named "left" and "right" by strings
that were not the tokens it trained; here one function returns a transformed picture together with its token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

AUGMENTATION_TOKENS: Mapping[str, str] = {
    "zoom-in": "zoom in",
    "zoom-out": "far away",
    "crop": "crop",
    "left": "on the left",
    "right": "on the right",
    "hflip": "flip",
    "vflip": "flip",
    "grayscale": "gray",
    "bright": "bright",
    "dimmed": "dark",
    "cutout": "hole",
    "grid": "grid of",
}
"""Name of each augmentation token -> the word or words that its row starts from, as in the code released first."""

_DRAWS_PER_GROUP = 5
"""Random numbers drawn for each group: one for whether it acts, one for which operation, three for the operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentedPhoto:
    """A photo after some transforms, with the mask after the same geometry and the tokens that name the transforms."""

    picture: Image.Image
    """RGB picture."""
    mask: Image.Image | None = None
    """Grey mask of the picture's size, white where the concept is; None for a photo without a mask."""
    augmentation: tuple[str, ...] = ()
    """Names of the transforms that the prompt has to name, keys of `AUGMENTATION_TOKENS`."""

    def map_images(self, transform: Callable[[Image.Image], Image.Image]) -> AugmentedPhoto:
        """Return the photo with the transform applied to its picture and to its mask."""
        return replace(self, picture=transform(self.picture), mask=self.mask and transform(self.mask))

    def add_tokens(self, *names: str) -> AugmentedPhoto:
        """Return the photo with these names appended to its augmentation."""
        return replace(self, augmentation=(*self.augmentation, *names))


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
    """Cover a rectangle with grey, and with black in the mask. `side`, `x` and `y` are those of `crop`."""
    width, height = photo.picture.size
    left, top = round(x * (1 - side) * width), round(y * (1 - side) * height)
    hole = (left, top, left + round(side * width), top + round(side * height))

    def cover(image: Image.Image) -> Image.Image:
        image = image.copy()
        image.paste((127, 127, 127) if image.mode == "RGB" else 0, hole)
        return image

    return photo.map_images(cover)


def grid(photo: AugmentedPhoto, tiles: int) -> AugmentedPhoto:
    """Fill the photo with `tiles` x `tiles` small copies of itself."""

    def tile(image: Image.Image) -> Image.Image:
        small = image.resize((-(-image.width // tiles), -(-image.height // tiles)), _FILTER[image.mode])
        shape = (tiles, tiles) + (1,) * (image.mode == "RGB")
        return Image.fromarray(np.tile(np.asarray(small), shape)[: image.height, : image.width])

    return photo.map_images(tile)


def augment_paired(photo: AugmentedPhoto, probability: float, generator: torch.Generator) -> AugmentedPhoto:
    """Let each group of operations (geometry, colour, other) act with this probability, one after the other.

    A group acts by one of its operations, drawn evenly, which adds its token. The number of draws from the generator
    is always the same.
    """
    for group in _GROUPS:
        coin, choice, *numbers = torch.rand(_DRAWS_PER_GROUP, generator=generator, dtype=torch.float64).tolist()
        if coin < probability:
            photo = group[int(choice * len(group))](photo, numbers)
    return photo


# Operations with their tokens: (photo, three numbers uniform in [0, 1)) -> the transformed photo. The ranges are those
# of the released code; it does not say how large a crop or a hole is, so those two ranges are this project's.

_Operation = Callable[[AugmentedPhoto, Sequence[float]], AugmentedPhoto]


def _zoom(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    """Zoom by a factor in [0.34, 1.4). Factors from 0.6 to 1.2 change too little to be named and add no token."""
    factor = _between(0.34, 1.4, numbers[0])
    names = ("zoom-out",) if factor < 0.6 else ("zoom-in",) if factor > 1.2 else ()
    return rescale(photo, factor).add_tokens(*names)


def _crop(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return crop(photo, _between(0.5, 0.9, numbers[0]), numbers[1], numbers[2]).add_tokens("crop")


def _shift(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    fraction = _between(0.15, 0.3, numbers[0])
    if numbers[1] < 0.5:
        return shift(photo, fraction).add_tokens("right")
    return shift(photo, -fraction).add_tokens("left")


def _hflip(photo: AugmentedPhoto, _numbers: Sequence[float]) -> AugmentedPhoto:
    return photo.map_images(ImageOps.mirror).add_tokens("hflip")


def _vflip(photo: AugmentedPhoto, _numbers: Sequence[float]) -> AugmentedPhoto:
    return photo.map_images(ImageOps.flip).add_tokens("vflip")


def _grayscale(photo: AugmentedPhoto, _numbers: Sequence[float]) -> AugmentedPhoto:
    return grayscale(photo).add_tokens("grayscale")


def _bright(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return brightness(photo, _between(1.3, 1.5, numbers[0])).add_tokens("bright")


def _dimmed(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return brightness(photo, _between(0.4, 0.6, numbers[0])).add_tokens("dimmed")


def _cutout(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return cutout(photo, _between(0.2, 0.4, numbers[0]), numbers[1], numbers[2]).add_tokens("cutout")


def _grid(photo: AugmentedPhoto, numbers: Sequence[float]) -> AugmentedPhoto:
    return grid(photo, 2 if numbers[0] < 0.5 else 3).add_tokens("grid")


_GROUPS: tuple[tuple[_Operation, ...], ...] = (
    (_zoom, _crop, _shift, _hflip, _vflip),
    (_grayscale, _bright, _dimmed),
    (_cutout, _grid),
)

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
