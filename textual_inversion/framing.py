"""Describe which part of a photo a square picture shows.

A denoiser that was trained on crops of photos of any size is told the photo's size and the crop (SDXL: Podell et al.
2023, section 2.2), so that it does not take a cut or enlarged photo for what is to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """A photo's size, and what was cut off the photo to make a square picture."""

    height: int
    """Height of the whole photo, px."""
    width: int
    """Width of the whole photo, px."""
    top: float
    """Height of the strip cut off above, in px of the picture."""
    left: float
    """Width of the strip cut off on the left, in px of the picture."""
    right: float
    """Width of the strip cut off on the right, in px of the picture."""

    @classmethod
    def of_box(cls, size: tuple[int, int], box: Sequence[float], side: int) -> Framing:
        """Return the framing of a picture of `side` px, resized from a square box of a photo.

        `size`: (width, height) of the photo. `box`: (left, top, right, bottom), px of the photo.
        """
        width, height = size
        left, top, right, _ = box
        scale = side / (right - left)
        return cls(height=height, width=width, top=top * scale, left=left * scale, right=(width - right) * scale)

    def mirrored(self) -> Framing:
        """Return the framing of the picture's mirror image, which is a crop of the photo's mirror image."""
        return replace(self, left=self.right, right=self.left)

    def numbers(self) -> tuple[int, int, int, int]:
        """Return (height, width, top, left), px, as SDXL reads them."""
        return self.height, self.width, round(self.top), round(self.left)
