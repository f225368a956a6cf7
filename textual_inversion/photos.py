"""A photo or mask as bytes -> an upright picture, or a ValueError that says what was wrong with it."""

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
    return _open(data, "photo", behind="white")


def open_mask(data: bytes, photo: Image.Image) -> Image.Image:
    """Decode the mask of an opened photo: grey, of the photo's size, white where the concept is, turned as its own EXIF
    orientation says; what is transparent is not the concept.

    Raises ValueError as `open_photo` does, for another shape than the photo's, and for a mask that is all black
    or holds 0 and 1 only.
    """
    mask = _open(data, "mask", behind="black").convert("L")
    (width, height), (across, down) = mask.size, photo.size
    if abs(width - height * across / down) > 1 and abs(height - width * down / across) > 1:
        raise ValueError(
            f"the mask is {width} x {height} px but its photo {across} x {down} (upright); draw the mask on the photo "
            "as it is seen, at any scale"
        )
    if (brightest := int(np.asarray(mask).max())) < 128:
        raise ValueError(
            f"the mask is all black (its brightest value is {brightest} of 255); white says where the concept is"
        )
    return mask.resize(photo.size, Image.Resampling.BOX)


def _open(data: bytes, kind: str, *, behind: str) -> Image.Image:
    """Upright RGB."""
    if not data:
        raise ValueError(f"the {kind} is empty (0 bytes)")
    try:
        picture = Image.open(BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(_too_large(f"{picture.width} x {picture.height} px"))
        picture.load()
        return _flatten(ImageOps.exif_transpose(picture), behind)
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture in any known format ({len(data)} bytes, starting {data[:8]!r})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(str(error))) from error
    except (OSError, SyntaxError, EOFError, IndexError, struct.error) as error:  # what PIL raises on damaged files
        raise ValueError(f"the picture is damaged or cut short ({len(data)} bytes): {error}") from error


def _too_large(size: str) -> str:
    return f"the picture is too large: {size}; at most {MAX_PIXELS} px are decoded, scale it down first"


def _flatten(picture: Image.Image, behind: str) -> Image.Image:
    """Any mode -> RGB, with this colour behind what is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, behind), picture).convert("RGB")
