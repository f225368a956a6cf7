"""The grid's layout: every picture is there, whole, at a legible size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from textual_inversion.grids import cells_of, find_cells, first_sample, grid

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


def test_the_first_sample_is_found_in_the_sheet() -> None:
    prompts = ["a photo of one and the same thing on a beach in the snow " * 2, "a sketch"]
    sheet = grid([plain(RED)] * 3, [(prompts[0], [plain(GREEN), plain(RED)]), (prompts[1], [plain(BLUE)] * 2)])
    found = first_sample(sheet, 3, prompts, 2)
    assert found.getcolors() == [(128 * 128, GREEN)]
    larger = grid([plain(RED)], [("a", [plain(GREEN, 512, 512)] * 2)])
    assert first_sample(larger, 1, ["a"], 2).getcolors() == [(320 * 320, GREEN)]


@pytest.mark.parametrize(
    ("num_photos", "prompts", "width"), [(2, ["a"], 1), (3, ["a", "b"], 1), (3, ["a"], 4), (0, ["a"], 1), (3, [], 3)]
)
def test_a_sheet_of_another_layout_is_returned_whole(num_photos: int, prompts: list[str], width: int) -> None:
    sheet = grid([plain(RED)] * 3, [("a", [plain(GREEN)])])
    assert first_sample(sheet, num_photos, prompts, width) is sheet


def test_rows_of_two_stand_side_by_side_and_leave_no_half_empty() -> None:
    rows = [(f"prompt {number}", [plain(GREEN)] * 2) for number in range(4)]
    sheet = grid([plain(RED)] * 5, rows)
    assert area(sheet, GREEN) == 8 * 128 * 128
    assert sheet.width < 5 * 128, "four pictures wide"
    assert sheet.height < 4 * 128, "two lines of samples and one of smaller photos"
    bottom = np.asarray(sheet)[-60]
    assert (bottom == GREEN).all(axis=1).sum() == 4 * 128


def test_many_photos_wrap_at_a_legible_size() -> None:
    sheet = grid([plain(RED)] * 30, [("a photo", [plain(GREEN)] * 2)])
    assert area(sheet, RED) == 30 * 64 * 64
    assert area(sheet, GREEN) == 2 * 128 * 128


def test_rows_without_pictures_are_left_out() -> None:
    assert grid([plain(RED)], [("a photo", [])]).size == grid([plain(RED)], []).size


def test_every_picture_is_found_in_the_sheet() -> None:
    labels = ["a photo of one and the same thing on a beach in the snow", "a sketch", "a drawing"]
    sheet = grid([plain(RED)] * 5, [(label, [plain(GREEN), plain(BLUE)]) for label in labels])
    cells = find_cells(sheet.size, 5, labels, 2)
    assert cells is not None
    assert cells == cells_of(128, 5, labels, 2)
    assert [sheet.crop(box).getcolors()[0][1] for box in cells.photos] == [RED] * 5
    assert [[sheet.crop(box).getcolors()[0][1] for box in row] for row in cells.rows] == [[GREEN, BLUE]] * 3
    assert find_cells(sheet.size, 5, labels[:2], 2) is None
