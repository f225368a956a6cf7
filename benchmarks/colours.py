"""Ask how varied the colours of a word's pictures are before and after the word is learned anew (Gal et al. 2022,
section 4.5, bias reduction).

CLIP names each picture's colour by the nearest of several captions (`textual_inversion/bias.py`). The entropy of the
named colours says how varied they are, in bits; its interval is the percentile bootstrap over pictures. A learned word
may also settle on the mean of all colours, a grey brown that CLIP still names by some caption; a picture is `mixed` if
by its pixels no colour word covers a fifth of the thing.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from math import log2
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.intervals import bootstrap_interval
from benchmarks.timing import table
from demo.captions import TINTS
from textual_inversion.bias import Proportion, nearest_caption_proportions
from textual_inversion.extractors import ClipExtractor

_BACKGROUND_DIFFERENCE = 40
"""Largest difference of the background's pixels to the median of the border, in levels of one channel."""
_HUE_DEGREES = 22
"""Largest distance of a pixel's hue to that of the colour that names it: less than half of the least distance between
two colour words (red and yellow, 46 degrees)."""
_LEAST_SATURATION = 0.4
_LEAST_VALUE = 0.25
_LEAST_SHARE = 0.2
"""Share of the thing that a colour word must cover to name it; wheels and windows have other colours."""


def entropy_bits(names: Iterable[object]) -> float:
    """Return the entropy of how often each name occurs, in bits: 0 for one name, log2 k for k equally frequent ones."""
    counts: dict[object, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    total = sum(counts.values())
    return max(0.0, -sum(count / total * log2(count / total) for count in counts.values()))


def colour_word(picture: Image.Image, tints: Mapping[str, tuple[int, int, int]] = TINTS) -> str:
    """Return the colour word that covers most of the thing in a picture on a plain background, or `` if it is mixed."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    thing = pixels[np.abs(pixels - np.median(border, 0)).max(2) > _BACKGROUND_DIFFERENCE]
    if not len(thing):
        return ""
    hsv = np.asarray(Image.fromarray(thing[None].astype(np.uint8)).convert("HSV"))[0].astype(float) / 255
    is_coloured = (hsv[:, 1] >= _LEAST_SATURATION) & (hsv[:, 2] >= _LEAST_VALUE)
    shares = {}
    for name, rgb in tints.items():
        hue = colorsys.rgb_to_hsv(*(level / 255 for level in rgb))[0]
        apart = np.abs((hsv[:, 0] - hue + 0.5) % 1 - 0.5) * 360
        shares[name] = float((is_coloured & (apart <= _HUE_DEGREES)).mean())
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _LEAST_SHARE else ""


def measure_colours(extractor: ClipExtractor, word: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Return the colours that CLIP names in pictures of a word, their entropy and its interval, and how many pictures
    are mixed."""
    captions = [f"a photo of a {tint} {word}" for tint in TINTS]
    proportions = nearest_caption_proportions(extractor.images(pictures), extractor.texts(captions))
    named = [tint for tint, share in zip(TINTS, proportions, strict=True) for _ in range(share.count)]
    mixed = Proportion(count=sum(not colour_word(picture) for picture in pictures), n=len(pictures))
    return {
        "entropy_bits": entropy_bits(named),
        "entropy_interval": bootstrap_interval(named, entropy_bits),
        "named": {tint: share.count for tint, share in zip(TINTS, proportions, strict=True)},
        "mixed": mixed.count,
        "mixed_interval": mixed.interval,
        "pictures": len(pictures),
    }


def show_colours(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: entropy of the named colours, mixed pictures and the colours, row by row."""
    lines: list[list[object]] = []
    for row in rows:
        low, high = row["entropy_interval"]
        least, most = row["mixed_interval"]
        named = ", ".join(f"{count} {tint}" for tint, count in row["named"].items() if count)
        lines.append(
            [
                row["word"],
                row["setup"],
                row["seed"],
                f"{row['entropy_bits']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['mixed']} of {row['pictures']} ({least:.0%} to {most:.0%})",
                named,
            ]
        )
    return table(["word", "", "seed", "entropy of the colours, bits", "mixed, by pixels", "colours by CLIP"], lines)
