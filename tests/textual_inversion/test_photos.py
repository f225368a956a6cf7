"""Photos as people send them: rotated, transparent, grey, cut short, or no photo at all."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from textual_inversion import photos
from textual_inversion.photos import open_mask, open_photo


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
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 4))
    opened = open_photo(encoded(picture.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (0, 0, 0)
    assert opened.getpixel((3, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 10, 10, 200, 0, 0])
    opened = open_photo(encoded(picture, "GIF", transparency=1))
    assert opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("P", "PNG")])
def test_other_modes_become_rgb(mode: str, form: str) -> None:
    assert open_photo(encoded(wide().convert(mode), form)).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = np.array([[0, 32896, 65535]], dtype=np.uint16)
    opened = open_photo(encoded(Image.fromarray(grey)))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_short(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form)
    with pytest.raises(ValueError, match=r"damaged or cut short|not a picture"):
        open_photo(data[: len(data) // 2])


def test_not_a_picture() -> None:
    with pytest.raises(ValueError, match=r"not a picture in any known format \(15 bytes, starting b'<html>no'"):
        open_photo(b"<html>no</html>")
    with pytest.raises(ValueError, match="empty"):
        open_photo(b"")


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="too large: 30 x 20 px"):
        open_photo(encoded(wide()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        open_photo(encoded(wide()))


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
