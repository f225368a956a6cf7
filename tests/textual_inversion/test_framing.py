"""A picture's framing says what a crop of the photo, resized with it, has cut off."""

from __future__ import annotations

import pytest

from textual_inversion.framing import Framing


@pytest.mark.parametrize(
    ("size", "box", "numbers", "mirrored"),
    [
        ((64, 64), (0, 0, 64, 64), (64, 64, 0, 0), (64, 64, 0, 0)),
        ((96, 64), (16, 0, 80, 64), (64, 96, 0, 8), (64, 96, 0, 8)),  # the centre, at half the photo's scale
        ((96, 64), (0, 32, 32, 64), (64, 96, 32, 0), (64, 96, 32, 64)),  # a corner, at the photo's scale
        ((30, 40), (5, 8, 21, 24), (40, 30, 16, 10), (40, 30, 16, 18)),  # enlarged
    ],
)
def test_numbers(
    size: tuple[int, int], box: tuple[int, ...], numbers: tuple[int, ...], mirrored: tuple[int, ...]
) -> None:
    framing = Framing.of_box(size, box, 32)
    assert framing.numbers() == numbers
    assert framing.mirrored().numbers() == mirrored
    assert framing.mirrored().mirrored() == framing
