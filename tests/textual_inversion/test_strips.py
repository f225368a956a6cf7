"""The strip of previews: every picture is there under its step, and comes back from the file as it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from textual_inversion.strips import MAX_PICTURES, Strip, strip_cells


def plain(level: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (level, 0, 0))


def strip_of(steps: range, side: int = 64) -> Strip:
    strip = Strip()
    for step in steps:
        strip = strip.with_picture(step, plain(step % 251, side))
    return strip


@pytest.mark.parametrize(("count", "side"), [(1, 64), (5, 64), (6, 96), (13, 512)])
def test_a_strip_comes_back_from_its_file(count: int, side: int) -> None:
    strip = strip_of(range(0, 10 * count, 10), side)
    back = Strip.from_png(strip.to_png())
    assert list(back.pictures) == list(strip.pictures) == list(range(0, 10 * count, 10))
    assert back.cell_px == strip.cell_px
    for step, picture in strip.pictures.items():
        assert back.pictures[step].tobytes() == picture.tobytes()


def test_pictures_stand_where_the_layout_says_under_their_steps() -> None:
    strip = strip_of(range(8))
    sheet = np.asarray(Image.open(io.BytesIO(strip.to_png())))
    size, boxes = strip_cells(strip.cell_px, 8)
    assert sheet.shape == (size[1], size[0], 3)
    for step, (left, top, right, bottom) in enumerate(boxes):
        assert (sheet[top:bottom, left:right] == (step, 0, 0)).all()
        assert (sheet[top - 18 : top, left:right] < 128).any(), "a label"


def test_a_picture_of_the_same_step_takes_the_place_of_the_earlier_one() -> None:
    strip = strip_of(range(3)).with_picture(1, plain(200))
    assert list(strip.pictures) == [0, 1, 2]
    assert strip.pictures[1].getpixel((0, 0)) == (200, 0, 0)
    assert list(strip.until(1).pictures) == [0, 1]


def test_a_long_strip_is_thinned_and_keeps_its_ends() -> None:
    steps = list(strip_of(range(300)).pictures)
    assert MAX_PICTURES // 2 <= len(steps) <= MAX_PICTURES
    assert (steps[0], steps[-1]) == (0, 299)


def test_other_files_are_refused() -> None:
    whole = strip_of(range(3)).to_png()
    picture = io.BytesIO()
    plain(1).save(picture, "PNG")
    for data in (b"", b"no picture", picture.getvalue(), whole[: len(whole) // 2]):
        with pytest.raises((ValueError, OSError)):
            Strip.from_png(data)
    with pytest.raises(ValueError, match="at least one picture"):
        Strip().to_png()
