"""Make up objects from two cut-outs: shapes and colours that no taught object has, for an encoder to be trained on.

An encoder that has seen a few hundred objects must make rows of objects that it has not seen. A made-up object keeps
enough of a drawing to look like a thing: one cut-out gets the colours of another one, its lower half, or all of it as a
part, and mostly other proportions or the other direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from demo.art import Sprite

_MIRRORED_SHARE = 0.3
_STRETCHED_SHARE = 0.5
_STRETCH = 0.4
"""Most that the logarithm of the ratio of the sides changes by."""


def make_up(sprite: Sprite, other: Sprite, rng: np.random.Generator) -> Sprite:
    """Return a cut-out made of the first one and of colours, a half or a part of the other one."""
    mixed = _MIXTURES[rng.integers(len(_MIXTURES))](sprite, other, rng)
    if rng.random() < _STRETCHED_SHARE:
        factor = float(np.exp(rng.uniform(-_STRETCH, _STRETCH)))
        mixed = mixed.resize((max(4, round(mixed.width * factor)), mixed.height), Image.Resampling.LANCZOS)
    return ImageOps.mirror(mixed) if rng.random() < _MIRRORED_SHARE else mixed


def _recoloured(sprite: Sprite, other: Sprite, rng: np.random.Generator) -> Sprite:
    """Give the cut-out the colours of the other one: a pixel takes the colour of the pixel that has the same rank among
    the other's by lightness."""
    levels = np.asarray(ImageOps.grayscale(sprite.convert("RGB")), np.int64)
    pixels = np.asarray(other)
    colours = pixels[pixels[..., 3] > 127][:, :3]
    if len(colours) == 0:
        return sprite
    lightness = colours @ np.array([299, 587, 114])
    colours = colours[np.argsort(lightness, kind="stable")]
    is_visible = np.asarray(sprite)[..., 3] > 127
    counts = np.bincount(levels[is_visible], minlength=256)
    rank = (np.cumsum(counts) - counts / 2) / max(1, counts.sum())
    chosen = colours[np.minimum((rank * len(colours)).astype(np.int64), len(colours) - 1)]
    result = Image.fromarray(chosen[levels].astype(np.uint8))
    result.putalpha(sprite.getchannel("A"))
    return result


def _joined(sprite: Sprite, other: Sprite, rng: np.random.Generator) -> Sprite:
    """Put the upper part of the cut-out on the lower part of the other one, which gets its width."""
    share = rng.uniform(0.35, 0.65)
    upper = sprite.crop((0, 0, sprite.width, max(2, round(share * sprite.height))))
    scaled = other.resize((sprite.width, max(4, round(other.height * sprite.width / other.width))))
    lower = scaled.crop((0, min(scaled.height - 2, round(share * scaled.height)), scaled.width, scaled.height))
    result = Image.new("RGBA", (sprite.width, upper.height + lower.height))
    result.paste(upper, (0, 0))
    result.paste(lower, (0, upper.height))
    return result


def _with_part(sprite: Sprite, other: Sprite, rng: np.random.Generator) -> Sprite:
    """Put the other cut-out, smaller, somewhere on the cut-out."""
    scale = rng.uniform(0.4, 0.6) * max(sprite.size) / max(other.size)
    part = other.resize((max(4, round(other.width * scale)), max(4, round(other.height * scale))))
    result = sprite.copy()
    room = (max(0, sprite.width - part.width), max(0, sprite.height - part.height))
    result.alpha_composite(part.crop((0, 0, *sprite.size)), tuple(int(rng.integers(each + 1)) for each in room))
    return result


_MIXTURES: tuple[Callable[[Sprite, Sprite, np.random.Generator], Sprite], ...] = (_recoloured, _joined, _with_part)
