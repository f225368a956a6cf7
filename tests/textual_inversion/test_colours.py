"""Colours of a profile other than sRGB, and numbers of more than 8 bits."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.icc_profiles import ADOBE_RGB, DISPLAY_P3, SRGB, cmyk_icc, grey_icc, icc
from tests.textual_inversion.test_photos import encoded
from tests.textual_inversion.test_picture_files import chunk
from textual_inversion.photos import open_mask, open_photo

GREEN = (60, 170, 70)


def srgb_of(colour: tuple[int, ...], primaries: tuple[tuple[float, ...], ...], gamma: float = 2.2) -> np.ndarray:
    """Return the sRGB levels of a colour by the equations of IEC 61966-2-1, from the primaries of its space."""
    linear = np.linalg.inv(np.transpose(SRGB)) @ np.transpose(primaries) @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize(("primaries", "value"), [(DISPLAY_P3, (0, 174, 49)), (ADOBE_RGB, (0, 172, 59))])
def test_wide_colours_become_srgb(form: str, primaries: tuple[tuple[float, ...], ...], value: tuple[int, ...]) -> None:
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(form, {})
    data = encoded(Image.new("RGB", (20, 20), GREEN), form, icc_profile=icc(primaries), **lossless)
    seen = np.array(open_photo(data).getpixel((5, 5)))
    assert np.abs(seen - srgb_of(GREEN, primaries)).max() <= 3
    assert np.abs(seen - value).max() <= 4


def test_srgb_under_any_name_is_left_alone() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_photo(encoded(noise, icc_profile=profile)).tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    "profile", [b"garbage" * 40, icc(DISPLAY_P3)[:200], grey_icc(1.0), cmyk_icc(np.zeros((2,) * 4))]
)
def test_a_profile_that_is_damaged_or_of_other_colours_is_ignored(profile: bytes) -> None:
    picture = Image.new("RGB", (20, 20), GREEN)
    assert open_photo(encoded(picture, icc_profile=profile)).getpixel((5, 5)) == GREEN


def test_grey_and_palettes_and_transparent_pictures_have_profiles_too() -> None:
    grey = Image.new("L", (20, 20), 100)
    linear = srgb_of((100,) * 3, SRGB, gamma=1.0)[0]
    assert abs(open_photo(encoded(grey, icc_profile=grey_icc(1.0))).getpixel((5, 5))[0] - linear) <= 2
    grey.putalpha(Image.new("L", (20, 20), 255))
    assert abs(open_photo(encoded(grey, icc_profile=grey_icc(1.0))).getpixel((5, 5))[0] - linear) <= 2
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    clear = Image.new("RGBA", (20, 20), (*GREEN, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    for picture in (palette, clear):
        opened = open_photo(encoded(picture, icc_profile=icc(DISPLAY_P3)))
        assert np.abs(np.array(opened.getpixel((5, 5))) - srgb_of(GREEN, DISPLAY_P3)).max() <= 3
    assert opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_become_what_their_profile_says(form: str) -> None:
    lightness = np.full((2,) * 4, 0.0)
    lightness[0, 0, 0, 0] = 100  # paper
    lightness[1, 0, 0, 0] = 53.6  # an ink in the place of cyan, whose L* is that of grey 128 in sRGB
    cyan = Image.new("CMYK", (20, 20), (255, 0, 0, 0))
    opened = open_photo(encoded(cyan, form, icc_profile=cmyk_icc(lightness)))
    assert np.abs(np.array(opened.getpixel((5, 5))) - 128).max() <= 3
    plain = open_photo(encoded(cyan, form)).getpixel((5, 5))
    assert np.abs(np.array(plain) - (0, 255, 255)).max() <= 2


def test_a_mask_keeps_its_levels() -> None:
    mask = Image.new("L", (20, 20), 100)
    mask.paste(255, (0, 0, 10, 20))
    opened = open_mask(encoded(mask, icc_profile=grey_icc(1.0)), Image.new("RGB", (20, 20)))
    assert opened.getpixel((15, 5)) == 100


def test_twelve_bits_have_a_white_of_their_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_photo(twelve_bit_tiff(2048))
    assert opened.getpixel((5, 5)) == (127, 127, 127)


def twelve_bit_tiff(value: int) -> bytes:
    """Return a grey TIFF of 16 x 16 px with 12 bits a pixel, all of one value."""
    pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    pixels = pair * 128
    tags = ((256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, 16))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, each) for tag, each in (*tags, (279, len(pixels))))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + entries + bytes(4) + pixels


@pytest.mark.parametrize("kind", ["grey TIFF", "RGB PNG"])
def test_sixteen_bits_that_hold_twelve_are_refused(kind: str) -> None:
    if kind == "grey TIFF":
        data = encoded(Image.fromarray(np.full((20, 20), 3000, np.uint16)), "TIFF")
    else:
        row = b"\0" + struct.pack(">H", 3000) * 60
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * 20)) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="would be black: its brightest value is about 2,8"):
        open_photo(data)
