"""TextBoost's paired augmentation (Park et al. 2024, v1): transforms of a photo that its prompt names.

A transform that acts adds its augmentation token to the prompt ("a A* photo of V*"), so what it did to the picture is
learned there and not in the concept; at inference the tokens are left out. Operations are pure functions of a picture
and its mask; `augment_paired` decides which act. The released code named "left" and "right" by strings that were not
the tokens it trained; here a transform and its token come out of one function together.
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
"""Name of each augmentation token -> the word or words it starts from, as in the code of the release day."""

_DRAWS_PER_GROUP = 5
"""Whether it acts, which operation, and up to three numbers for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One way of showing a photo; masks go through the same geometry."""

    picture: Image.Image
    """RGB"""
    mask: Image.Image | None = None
    """Grey, of the picture's size: white where the concept is."""
    augmentation: tuple[str, ...] = ()
    """Names of the transforms that the prompt is to name, from `AUGMENTATION_TOKENS`."""

    def each(self, change: Callable[[Image.Image], Image.Image]) -> View:
        """The change made to the picture and to the mask."""
        return replace(self, picture=change(self.picture), mask=self.mask and change(self.mask))

    def named(self, *names: str) -> View:
        """With these added to its augmentation."""
        return replace(self, augmentation=(*self.augmentation, *names))


def rescale(view: View, factor: float) -> View:
    """Zoom about the centre. Below 1 the picture's edge goes on outside it, the mask's outside is black."""
    width, height = view.picture.size
    if factor >= 1:
        across, down = (1 - 1 / factor) * width / 2, (1 - 1 / factor) * height / 2
        return view.each(lambda image: _resize(image, (across, down, width - across, height - down)))
    inner = max(1, round(width * factor)), max(1, round(height * factor))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    around = (top, height - inner[1] - top), (left, width - inner[0] - left)
    return view.each(lambda image: _pad(image.resize(inner, _FILTER[image.mode]), around))


def crop(view: View, side: float, x: float, y: float) -> View:
    """The part with this fraction of the sides, at (x, y) in [0, 1] of the room there is, blown up."""
    width, height = view.picture.size
    left, top = x * (1 - side) * width, y * (1 - side) * height
    return view.each(lambda image: _resize(image, (left, top, left + side * width, top + side * height)))


def shift(view: View, fraction: float) -> View:
    """Moved to the right by a fraction of the width, to the left if negative; what is bared shows the picture's edge,
    in the mask black."""
    by = round(fraction * view.picture.width)

    def move(image: Image.Image) -> Image.Image:
        kept = image.crop((max(0, -by), 0, image.width - max(0, by), image.height))
        return _pad(kept, ((0, 0), (max(0, by), max(0, -by))))

    return view.each(move)


def grayscale(view: View) -> View:
    """Without colour."""
    return replace(view, picture=ImageOps.grayscale(view.picture).convert("RGB"))


def brightness(view: View, factor: float) -> View:
    """Every value times the factor."""
    return replace(view, picture=ImageEnhance.Brightness(view.picture).enhance(factor))


def cutout(view: View, side: float, x: float, y: float) -> View:
    """A grey rectangle of this fraction of the sides at (x, y), as in `crop`; the mask is black there."""
    width, height = view.picture.size
    box = [round(value) for value in (x * (1 - side) * width, y * (1 - side) * height, side * width, side * height)]
    where = (box[0], box[1], box[0] + box[2], box[1] + box[3])

    def cut(image: Image.Image) -> Image.Image:
        image = image.copy()
        image.paste((127, 127, 127) if image.mode == "RGB" else 0, where)
        return image

    return view.each(cut)


def grid(view: View, tiles: int) -> View:
    """The picture `tiles` x `tiles` times, each smaller."""

    def tile(image: Image.Image) -> Image.Image:
        small = image.resize((-(-image.width // tiles), -(-image.height // tiles)), _FILTER[image.mode])
        shape = (tiles, tiles) + (1,) * (image.mode == "RGB")
        return Image.fromarray(np.tile(np.asarray(small), shape)[: image.height, : image.width])

    return view.each(tile)


def augment_paired(view: View, probability: float, generator: torch.Generator) -> View:
    """Each group in turn, geometry, colour, other, acts with this probability by one of its operations, drawn evenly,
    and adds its token. The number of draws is always the same."""
    for group in _GROUPS:
        coin, choice, *numbers = torch.rand(_DRAWS_PER_GROUP, generator=generator, dtype=torch.float64).tolist()
        if coin < probability:
            view = group[int(choice * len(group))](view, numbers)
    return view


# What can act: (view, three numbers uniform in [0, 1)) -> the changed view with its token. Ranges are the released
# code's; it does not say how large a crop or a hole is, so those are ours.

_Act = Callable[[View, Sequence[float]], View]


def _zoom(view: View, numbers: Sequence[float]) -> View:
    """A mild change of size is no augmentation to speak of, and has no token."""
    factor = _between(0.34, 1.4, numbers[0])
    names = ("zoom-out",) if factor < 0.6 else ("zoom-in",) if factor > 1.2 else ()
    return rescale(view, factor).named(*names)


def _crop(view: View, numbers: Sequence[float]) -> View:
    return crop(view, _between(0.5, 0.9, numbers[0]), numbers[1], numbers[2]).named("crop")


def _shift(view: View, numbers: Sequence[float]) -> View:
    fraction = _between(0.15, 0.3, numbers[0])
    return shift(view, fraction).named("right") if numbers[1] < 0.5 else shift(view, -fraction).named("left")


def _hflip(view: View, _numbers: Sequence[float]) -> View:
    return view.each(ImageOps.mirror).named("hflip")


def _vflip(view: View, _numbers: Sequence[float]) -> View:
    return view.each(ImageOps.flip).named("vflip")


def _grayscale(view: View, _numbers: Sequence[float]) -> View:
    return grayscale(view).named("grayscale")


def _bright(view: View, numbers: Sequence[float]) -> View:
    return brightness(view, _between(1.3, 1.5, numbers[0])).named("bright")


def _dimmed(view: View, numbers: Sequence[float]) -> View:
    return brightness(view, _between(0.4, 0.6, numbers[0])).named("dimmed")


def _cutout(view: View, numbers: Sequence[float]) -> View:
    return cutout(view, _between(0.2, 0.4, numbers[0]), numbers[1], numbers[2]).named("cutout")


def _grid(view: View, numbers: Sequence[float]) -> View:
    return grid(view, 2 if numbers[0] < 0.5 else 3).named("grid")


_GROUPS: tuple[tuple[_Act, ...], ...] = (
    (_zoom, _crop, _shift, _hflip, _vflip),
    (_grayscale, _bright, _dimmed),
    (_cutout, _grid),
)

_FILTER = {"RGB": Image.Resampling.LANCZOS, "L": Image.Resampling.BOX}


def _between(low: float, high: float, number: float) -> float:
    return low + (high - low) * number


def _resize(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """This part of the image at the whole image's size."""
    return image.resize(image.size, _FILTER[image.mode], box=box)


def _pad(image: Image.Image, around: tuple[tuple[int, int], tuple[int, int]]) -> Image.Image:
    """More above and below, left and right, in px: a picture's edge goes on, around a mask is black."""
    if image.mode == "RGB":
        return Image.fromarray(np.pad(np.asarray(image), (*around, (0, 0)), "edge"))
    return Image.fromarray(np.pad(np.asarray(image), around))
