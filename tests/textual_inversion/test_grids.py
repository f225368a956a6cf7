"""The grid's layout: every picture is there, whole, at a legible size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from textual_inversion.grids import grid

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def plain(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=2).sum())


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    chequered = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255).convert("RGB")
    sheet = grid([plain(RED)] * 3, [("a photo", [plain(GREEN)] * 4), ("a sketch", [chequered])])
    assert area(sheet, RED) == 3 * 128 * 128
    assert area(sheet, GREEN) == 4 * 128 * 128
    assert area(sheet, (0, 0, 0)) == 128 * 128 // 2, "no smoothing"


def test_large_pictures_are_reduced() -> None:
    sheet = grid([plain(RED, 900, 600)], [("a photo", [plain(BLUE, 512, 512)] * 2)])
    assert area(sheet, BLUE) == 2 * 320 * 320
    assert area(sheet, RED) == pytest.approx(320 * 213, rel=0.02), "fitted whole, not cropped"
    assert sheet.width < 700


def test_labels_are_drawn_and_long_ones_wrapped() -> None:
    short = grid([], [("a photo", [plain(RED)])])
    long = grid([], [("a photo of one and the same thing on a beach in the snow " * 3, [plain(RED)])])
    assert long.width == short.width
    assert long.height > short.height + 50
    assert (np.asarray(short)[:, :, :].min(axis=2) < 100).sum() > area(short, RED)


def test_photos_of_any_mode_are_shown() -> None:
    pictures = [plain(RED).convert("L"), plain(RED).convert("P"), plain(RED)]
    assert area(grid(pictures, []), RED) >= 128 * 128


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        grid([], [("a photo", [])])
