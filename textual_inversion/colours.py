"""Convert decoded pictures of any mode, depth and colour profile to 8-bit sRGB.

Models, and all who look at pictures without a profile, take RGB values for sRGB (IEC 61966-2-1). A picture with another
profile (Display P3 of phones, Adobe RGB of cameras, the CMYK of printers) says so, and is converted.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from textual_inversion.errors import BadInput

_MAX_PROFILE_BYTES = 8 * 2**20
"""Largest colour profile that is applied; those of printers hold some megabytes."""
_UNSEEN_LEVELS = 2
"""Largest difference, in levels of 255, between a profile and sRGB that is not corrected: variants of sRGB differ from
each other as much."""
_BLACK_LEVEL = 16
"""Level of 255 that the brightest value of a picture of more than 8 bits must reach."""
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""PIL's mode by a profile's colour space."""
_WITH_ALPHA = {"L": "LA", "LA": "LA", "La": "LA"}
"""Mode with alpha of the modes that have one channel of colour; all others become RGBA."""


def white_level(picture: Image.Image) -> int:
    """Return the value that stands for white in a picture of one channel of more than 8 bits; 255 for all others.

    To be called before the pixels are decoded. Raises BadInput for numbers whose value for white nobody knows: with a
    point, with a sign, or with 32 bits.
    """
    raw_modes = str(getattr(picture, "tile", ""))  # of an opened file; forgotten once its pixels are decoded
    if picture.mode == "F":
        raise BadInput("it holds floating-point numbers, whose value for white is not known; save it with 8 or 16 bits")
    if picture.mode == "I" and picture.format != "PNG":  # older releases of PIL open PNGs of 16 bits so
        raise BadInput(
            "it holds integers of 32 bits or with a sign, whose value for white is not known; save it with 8 or 16 bits"
        )
    if picture.mode.startswith("I") or ";16" in raw_modes:
        return 4095 if "I;12" in raw_modes else 65535
    return 255


def to_rgb(picture: Image.Image, background: str, white: int, *, managed: bool) -> Image.Image:
    """Convert a decoded picture to RGB, with the background colour where it is transparent.

    white: `white_level` of the picture. managed: convert from the picture's colour profile to sRGB. A profile that
    cannot be read, or is not for the picture's kind of colour, is ignored, as viewers do; CMYK without a profile
    becomes (1 - ink)(1 - black) per channel. Raises BadInput for a picture of more than 8 bits that would be black.
    """
    profile = picture.info.get("icc_profile") if managed else None
    if picture.mode.startswith("I"):  # PIL's own conversion would clip at 255
        levels = np.asarray(picture).astype(np.uint32)
        levels *= 255
        levels //= white
        picture = Image.fromarray(levels.astype(np.uint8))
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert(_WITH_ALPHA.get(picture.mode, "RGBA"))
        alpha = picture.getchannel("A")
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if profile:
        picture = _to_srgb(picture, profile)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if white > 255:
        _check_not_black(picture, white)
    if alpha is None:
        return picture
    picture.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Return the picture with a profile's colours in sRGB; unchanged for a profile that is none of this mode."""
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in _PROFILE_MODES.values():
        picture = picture.convert("RGB")
    transform = _transform(profile, picture.mode) if len(profile) <= _MAX_PROFILE_BYTES else None
    return picture if transform is None else transform.apply(picture)


@lru_cache(8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB: relative colorimetric, with black point compensation; None if the
    profile is damaged, is for another mode, or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if _PROFILE_MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform moves no colour of a grid by more than `_UNSEEN_LEVELS`."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)  # 0 to 255
    axes = (steps,) * len(mode)
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(1, -1, len(mode))
    before = Image.fromarray(grid.squeeze(-1) if mode == "L" else grid)
    difference = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return int(np.abs(difference).max()) <= _UNSEEN_LEVELS


def _check_not_black(picture: Image.Image, white: int) -> None:
    brightest = int(np.asarray(picture).max())
    if brightest < _BLACK_LEVEL:
        raise BadInput(
            f"it would be black: its brightest value is about {brightest * white // 255:,}, and {white:,} is white in "
            "a file of this depth; its numbers seem to have fewer bits than the file, so scale them or save 8 bits"
        )
