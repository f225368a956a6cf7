"""Decode photos and masks from bytes to upright pictures; each BadInput says what is wrong and what to do."""

from __future__ import annotations

from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from textual_inversion.errors import BadInput

MAX_PIXELS = 100_000_000
"""Largest number of pixels that is decoded. Larger pictures are refused by their header: a small file can claim any
size."""

MIN_SIDE_PX = 16
"""Shortest side that a photo may have. Smaller ones are tracking pixels, spacers and broken thumbnails."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are decoded (AVIF where PIL can). PIL reads many more, and starts another program for one (EPS)."""


def open_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one photo to RGB: turned as its EXIF orientation says, transparency laid over white, first frame only.

    Raises BadInput for bytes that are not a picture in one of the `FORMATS`, are cut short, would take too much
    memory, or are smaller than `MIN_SIDE_PX` on a side.
    """
    photo = _decode(data, "photo", max_pixels, background="white")
    if min(photo.size) < MIN_SIDE_PX:
        raise BadInput(
            f"the photo is {photo.width} x {photo.height} px; at least {MIN_SIDE_PX} on each side are needed. Is it a "
            "placeholder or a tracking pixel?"
        )
    return photo


def open_mask(data: bytes, photo: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the mask of an opened photo to grey, of the photo's size, white where the concept is.

    The mask is turned as its own EXIF orientation says; transparent pixels count as black. Raises BadInput for what
    `open_photo` refuses, small sizes excepted, for another shape than the photo's, and for a mask that is all black or
    holds 0 and 1 only.
    """
    mask = _decode(data, "mask", max_pixels, background="black").convert("L")
    (width, height), (across, down) = mask.size, photo.size
    if abs(width - height * across / down) > 1 and abs(height - width * down / across) > 1:
        raise BadInput(
            f"the mask is {width} x {height} px but its photo {across} x {down} (upright); draw the mask on the photo "
            "as it is seen, at any scale"
        )
    if (brightest := int(np.asarray(mask).max())) < 128:
        raise BadInput(
            f"the mask is all black (its brightest value is {brightest} of 255); white says where the concept is"
        )
    return mask.resize(photo.size, Image.Resampling.BOX)


def read_header(data: bytes, kind: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture without decoding its pixels, which may still fail later. `kind` names the picture in messages.

    Raises BadInput unless the picture is in one of the `FORMATS` and has at most `max_pixels`.
    """
    if not data:
        raise BadInput(f"the {kind} is empty (0 bytes)")
    try:
        picture = Image.open(BytesIO(data), formats=_decodable_formats())
    except UnidentifiedImageError:
        raise BadInput(_unknown(data)) from None
    except Image.DecompressionBombError as error:
        raise BadInput(_too_large(f"above {2 * (Image.MAX_IMAGE_PIXELS or 0):,} px", max_pixels)) from error
    except Exception as error:  # PIL's readers raise errors of nearly every type on damaged files
        raise BadInput(_damaged(data, error)) from error
    if picture.width * picture.height > max_pixels:
        raise BadInput(_too_large(f"{picture.width} x {picture.height} px", max_pixels))
    return picture


@cache
def _decodable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(data: bytes, kind: str, max_pixels: int, *, background: str) -> Image.Image:
    """Decode a picture to upright RGB, with the background colour where it is transparent."""
    picture = read_header(data, kind, max_pixels)
    if picture.mode == "F":
        raise BadInput(
            f"the {kind} holds floating-point numbers, whose value for white is not known; save it with 8 or 16 bits"
        )
    try:
        picture.load()
        return _flatten(ImageOps.exif_transpose(picture), background)
    except Exception as error:
        raise BadInput(_damaged(data, error)) from error


def _unknown(data: bytes) -> str:
    """Return a message that says what the bytes hold, where their beginning tells."""
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return (
            f"not a picture but a web page (HTML, {len(data)} bytes): the address may lead to a page about the photo, "
            "to a login or to an error"
        )
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "HEIC pictures are not decoded; save it as JPEG, PNG or WebP"
    return f"not a picture in any known format ({len(data)} bytes, starting {data[:8]!r}); known: {', '.join(FORMATS)}"


def _damaged(data: bytes, error: Exception) -> str:
    return f"the picture is damaged or cut short ({len(data)} bytes): {str(error) or type(error).__name__}"


def _too_large(size: str, max_pixels: int) -> str:
    return f"the picture is too large: {size}; at most {max_pixels:,} px are decoded, scale it down first"


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    """Convert a picture of any mode to RGB, with the background colour where it is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
