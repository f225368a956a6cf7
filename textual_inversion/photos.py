"""A photo as bytes -> an upright RGB picture, or a ValueError that says what was wrong with it."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can claim any size."""


def open_photo(data: bytes) -> Image.Image:
    """Decode one photo: turned as its EXIF orientation says, transparency laid over white, RGB, first frame only.

    Raises ValueError for bytes that are not a picture, are cut short, or would take too much memory.
    """
    if not data:
        raise ValueError("the photo is empty (0 bytes)")
    try:
        picture = Image.open(BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(_too_large(f"{picture.width} x {picture.height} px"))
        picture.load()
        return _flatten(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture in any known format ({len(data)} bytes, starting {data[:8]!r})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(str(error))) from error
    except (OSError, SyntaxError, EOFError, IndexError, struct.error) as error:  # what PIL raises on damaged files
        raise ValueError(f"the picture is damaged or cut short ({len(data)} bytes): {error}") from error


def _too_large(size: str) -> str:
    return f"the picture is too large: {size}; at most {MAX_PIXELS} px are decoded, scale it down first"


def _flatten(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB, over white."""
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
