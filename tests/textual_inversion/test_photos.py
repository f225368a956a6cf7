"""Photos as people send them: rotated, transparent, grey, cut short, or no photo at all."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.icc_profiles import DISPLAY_P3, icc
from textual_inversion.photos import open_mask, open_photo, open_preview


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def wide() -> Image.Image:
    """30 x 20, red on the left, blue on the right."""
    picture = Image.new("RGB", (30, 20), "red")
    picture.paste("blue", (15, 0, 30, 20))
    return picture


def test_a_plain_photo_is_unchanged() -> None:
    assert open_photo(encoded(wide())).tobytes() == wide().tobytes()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned a quarter clockwise
    upright = open_photo(encoded(wide(), exif=exif.tobytes()))
    assert upright.size == (20, 30)
    assert upright.getpixel((10, 2)) == (255, 0, 0)
    assert upright.getpixel((10, 27)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 16))
    opened = open_photo(encoded(picture.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (0, 0, 0)
    assert opened.getpixel((3, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([10, 10, 10, 200, 0, 0])
    opened = open_photo(encoded(picture, "GIF", transparency=1))
    assert opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("P", "PNG")])
def test_other_modes_become_rgb(mode: str, form: str) -> None:
    assert open_photo(encoded(wide().convert(mode), form)).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = np.tile(np.array([0, 32896, 65535], dtype=np.uint16), (16, 6))
    opened = open_photo(encoded(Image.fromarray(grey)))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_short(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form)
    with pytest.raises(ValueError, match=r"damaged or cut short|not a picture"):
        open_photo(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the photo is empty"),
        (encoded(Image.new("RGB", (1, 1))), "the photo is 1 x 1 px; at least 16 on each side"),
        (
            encoded(Image.new("1", (16, 1601))),
            "the photo is 16 x 1601 px; its longer side may be 100 times",
        ),
        (encoded(Image.new("1", (16, 600_000))), "16 x 600000 px; its longer side"),  # 2 KB; 8 GB in a CLIP's resizing
        (encoded(Image.new("F", (30, 20)), "TIFF"), "floating-point numbers"),
        (encoded(Image.fromarray(np.full((20, 30), 200, np.int32)), "TIFF"), "integers of 32 bits or with a sign"),
        (encoded(Image.fromarray(np.full((20, 30), 4095, np.uint16))), "be black: its brightest value is about 3,855"),
    ],
)
def test_what_is_no_usable_photo_is_told(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_photo(data)


def test_a_photo_as_long_as_allowed_is_opened() -> None:
    assert open_photo(encoded(Image.new("1", (1600, 16)))).size == (1600, 16)


TURNED = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + bytes(4)
TURNED_WITH_ODD_RATIO = (
    b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHHHHII", 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38) + bytes(4)
    + struct.pack("<ii", -1, 0)
)  # fmt: skip
TURNED_AS_TEXT = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, 2, 2, b"6\0") + bytes(4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"garbage!", (30, 20)),
        (b"", (30, 20)),
        (TURNED, (20, 30)),
        (TURNED[:20], (30, 20)),
        (TURNED_WITH_ODD_RATIO, (20, 30)),
        (TURNED_AS_TEXT, (30, 20)),
    ],
)
def test_the_orientation_alone_is_read_of_exif(form: str, exif: bytes, size: tuple[int, int]) -> None:
    assert open_photo(encoded(wide(), form, exif=b"Exif\0\0" + exif)).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_turns_as_pil_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    data = encoded(noise, exif=exif.tobytes())
    assert open_photo(data).tobytes() == ImageOps.exif_transpose(Image.open(BytesIO(data))).tobytes()


def test_a_preview_is_small_upright_and_in_srgb() -> None:
    preview = open_preview(encoded(wide(), "JPEG", exif=b"Exif\0\0" + TURNED, icc_profile=icc(DISPLAY_P3)), 15)
    assert preview.size == (10, 15)
    assert preview.getpixel((5, 3))[0] == 255


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "green")]
    opened = open_photo(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert opened.size == (30, 20)
    red, green, blue = opened.getpixel((15, 10))
    assert red > 240
    assert max(green, blue) < 16


def test_a_palette_with_alpha() -> None:
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((3, 3), 1)
    opened = open_photo(encoded(picture, "PNG", transparency=bytes([0, 128])))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((3, 3)) == (227, 127, 127)


_SEEDS = {
    form: encoded(
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (20, 24, 3), dtype=np.uint8)), form, **options
    )
    for form, options in {
        "PNG": {}, "JPEG": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"},
    }.items()
}  # fmt: skip


@settings(max_examples=150)
@given(
    form=st.sampled_from(sorted(_SEEDS)), cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), max_size=6),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_whatever_was_done_to_a_file_it_is_a_picture_or_a_reason(
    form: str, cut: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(_SEEDS[form][: len(_SEEDS[form]) - cut // 4] if cut % 2 else _SEEDS[form])
    for place, value in changes:
        if data:
            data[place % len(data)] = value
    try:
        opened = open_photo(bytes(data), max_pixels=100_000)
    except ValueError as error:
        reason = str(error)
    else:
        reason = "it is fine"
        assert opened.mode == "RGB"
        assert opened.width * opened.height <= 100_000
    assert 10 <= len(reason) < 400


def mask(size: tuple[int, int] = (30, 20)) -> Image.Image:
    """White in its left half."""
    picture = Image.new("L", size, 0)
    picture.paste(255, (0, 0, size[0] // 2, size[1]))
    return picture


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "I;16"])
def test_a_mask_of_any_mode_and_scale_fits_its_photo(mode: str) -> None:
    small = mask((14, 10))
    if mode == "I;16":
        small = Image.fromarray(np.asarray(small).astype(np.uint16) * 257)
    opened = open_mask(encoded(small.convert(mode)), wide())
    assert (opened.mode, opened.size) == ("L", (30, 20))
    assert opened.getpixel((2, 10)) == 255
    assert opened.getpixel((27, 10)) == 0


def test_masks_and_photos_are_turned_alike() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = open_photo(encoded(wide(), exif=exif.tobytes()))
    turned = open_mask(encoded(mask(), exif=exif.tobytes()), photo)
    assert turned.size == photo.size == (20, 30)
    assert turned.getpixel((10, 2)) == 255
    assert turned.getpixel((10, 27)) == 0


def test_what_is_transparent_is_not_the_concept() -> None:
    cut_out = Image.new("RGBA", (30, 20), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 15, 20))
    opened = open_mask(encoded(cut_out), wide())
    assert opened.getpixel((2, 2)) == 255
    assert opened.getpixel((27, 2)) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(mask((20, 30))), "the mask is 20 x 30 px but its photo 30 x 20"),
        (encoded(Image.new("L", (30, 20), 0)), r"the mask is all black \(its brightest value is 0 of 255\); white"),
        (encoded(Image.new("L", (30, 20), 1)), "brightest value is 1 of 255"),
        (b"", "the mask is empty"),
        (b"nothing", "not a picture"),
    ],
)
def test_masks_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_mask(data, wide())
