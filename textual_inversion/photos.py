"""Decode photos and masks from bytes to upright pictures; each BadInput says what is wrong and what to do."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from textual_inversion.colours import to_rgb, white_level
from textual_inversion.errors import BadInput
from textual_inversion.picture_files import MAX_PIXELS, damaged, read_header

MIN_SIDE_PX = 16
"""Shortest side that a photo may have. Smaller ones are tracking pixels, spacers and broken thumbnails."""

MAX_ASPECT_RATIO = 100
"""Largest ratio of a photo's sides. Feature extractors scale the shorter side to some 224 px before they crop, so that
a file of two kilobytes, 16 x 600,000 px, would become a picture of gigabytes."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation of a picture -> the turn that sets it upright (CIPA DC-008, 4.6.5.1.6)."""


def open_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one photo to sRGB: turned as its EXIF orientation says, colours as its profile says (`colours`),
    transparency laid over white, first frame only.

    Raises BadInput for bytes that are not a picture in a known format, are cut short, would take too much memory or
    time (`picture_files.read_header`), are smaller than `MIN_SIDE_PX` on a side, or longer than `MAX_ASPECT_RATIO`.
    """
    photo = _decode(data, "photo", max_pixels, background="white", managed=True)
    if min(photo.size) < MIN_SIDE_PX:
        raise BadInput(
            f"the photo is {photo.width} x {photo.height} px; at least {MIN_SIDE_PX} on each side are needed. Is it a "
            "placeholder or a tracking pixel?"
        )
    return photo


def open_mask(data: bytes, photo: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the mask of an opened photo to grey, of the photo's size, white where the concept is.

    The mask is turned as its own EXIF orientation says; its colour profile is ignored, as its levels are no colours,
    and transparent pixels count as black. Raises BadInput for what `open_photo` refuses, small sizes excepted, for
    another shape than the photo's, and for a mask that is all black or holds 0 and 1 only.
    """
    mask = _decode(data, "mask", max_pixels, background="black", managed=False).convert("L")
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


def open_preview(data: bytes, side_px: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to sRGB as `open_photo` does, of any size, scaled down to at most `side_px` on its longer side.

    Raises BadInput for bytes that are not a picture in a known format, are cut short, or would take too much memory.
    """
    picture = read_header(data, "picture", max_pixels)
    picture.draft("RGB", (side_px, side_px))  # decodes a JPEG at a fraction of its size
    preview = _load(picture, data, background="white", managed=True)
    preview.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return preview


def _decode(data: bytes, kind: str, max_pixels: int, *, background: str, managed: bool) -> Image.Image:
    """Decode a photo or mask to upright RGB; see `_load`."""
    picture = read_header(data, kind, max_pixels)
    long, short = max(picture.size), min(picture.size)
    if long > MAX_ASPECT_RATIO * short:
        raise BadInput(
            f"the {kind} is {picture.width} x {picture.height} px; its longer side may be {MAX_ASPECT_RATIO} times the "
            "shorter at most, so cut it"
        )
    return _load(picture, data, background=background, managed=managed)


def _load(picture: Image.Image, data: bytes, *, background: str, managed: bool) -> Image.Image:
    """Decode the pixels of an opened picture to upright RGB, with the background colour where it is transparent.

    managed: convert colours to sRGB by the picture's profile.
    """
    try:
        white = white_level(picture)
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = to_rgb(picture, background, white, managed=managed)
        return picture if turn is None else picture.transpose(turn)
    except BadInput:
        raise
    except Exception as error:
        raise damaged(data, error) from error


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a decoded picture, 1 to 8; 1 where its EXIF cannot be read: it is good without."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL's parser raises errors of nearly every type on malformed blocks
        return 1
    return orientation if isinstance(orientation, int) else 1
