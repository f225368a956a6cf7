"""The sample grid: one picture that shows a concept's photos and, under them, labelled blocks of samples, one per
prompt."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from PIL import Image, ImageDraw, ImageFont

_MARGIN_PX = 12
_GAP_PX = 4
_LABEL_PX = 14
_LINE_PX = math.ceil(1.35 * _LABEL_PX)
_MIN_CELL_PX = 128
_MAX_CELL_PX = 320
_MIN_PHOTO_PX = 64
_COLUMNS = 4
"""Pictures beside each other, where the blocks of several prompts have room there."""
_TITLE = "photos"
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, as PIL takes them."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Place of a label and of its pictures on the sheet."""

    left: int
    top: int
    lines: Sequence[str]
    """Lines of the label."""
    cells: Sequence[Box]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Places of everything on a sheet."""

    photos: _Block | None
    rows: Sequence[_Block]
    size: tuple[int, int]


def grid(
    photos: Sequence[Image.Image], rows: Sequence[tuple[str, Sequence[Image.Image]]], *, title: str = _TITLE
) -> Image.Image:
    """Draw the photos under `title`, then each row's pictures under the row's label (its prompt).

    Rows of one or two pictures stand beside each other, so that the sheet is four pictures wide. Cells are square, 128
    to 320 px: small pictures are enlarged by a whole factor without smoothing, so that the grid shows the pixels the
    model drew; larger ones are reduced. Photos are fitted whole, never cropped, and are as small as it takes to stand
    in one line, at least 64 px. Rows without pictures are left out. Raises ValueError if there is no picture.
    """
    rows = [(label, pictures) for label, pictures in rows if pictures]
    samples = [picture for _, pictures in rows for picture in pictures]
    if not samples and not photos:
        raise ValueError("a grid needs at least one picture")
    cell = cell_side(max(max(picture.size) for picture in samples or photos))
    across = max((len(pictures) for _, pictures in rows), default=0)
    layout = _layout(len(photos), title, [label for label, _ in rows], across, cell)

    sheet = Image.new("RGB", layout.size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    blocks = [(layout.photos, photos)] if layout.photos else []
    blocks += [(block, pictures) for block, (_, pictures) in zip(layout.rows, rows, strict=True)]
    for block, pictures in blocks:
        for number, line in enumerate(block.lines):
            pen.text((block.left, block.top + number * _LINE_PX), line, fill=_INK, font=label_font())
        for (left, top, right, _), picture in zip(block.cells, pictures, strict=False):
            side = right - left
            fitted = fit(picture.convert("RGB"), side)
            sheet.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
    return sheet


@dataclass(frozen=True, slots=True)
class SheetCells:
    """Places of the pictures on a sheet that `grid` drew."""

    size: tuple[int, int]
    """Width and height of the sheet in pixels."""
    photos: tuple[Box, ...]
    rows: tuple[tuple[Box, ...], ...]
    """Cells of each row's samples."""


def cells_of(cell_px: int, num_photos: int, labels: Sequence[str], pictures_per_row: int) -> SheetCells:
    """Return the places of the pictures on a sheet of these photos and labels, with the title "photos" and cells of
    this side."""
    layout = _layout(num_photos, _TITLE, labels, pictures_per_row, cell_px)
    photos = tuple(layout.photos.cells) if layout.photos else ()
    return SheetCells(layout.size, photos, tuple(tuple(block.cells) for block in layout.rows))


def cell_px_of(width_px: int, num_labels: int, pictures_per_row: int) -> int | None:
    """Return the side of the cells of a sheet of this width; None if no sheet of these rows has it."""
    columns = _columns(num_labels, pictures_per_row)
    cell, rest = divmod(width_px - 2 * _MARGIN_PX - (columns - 1) * _GAP_PX, columns)
    return cell if not rest and _MIN_CELL_PX <= cell <= _MAX_CELL_PX else None


def find_cells(
    size: tuple[int, int], num_photos: int, labels: Sequence[str], pictures_per_row: int
) -> SheetCells | None:
    """Return the places of the pictures on a sheet of this size; None if a sheet of these photos and labels has
    another, as one of an earlier release may have."""
    cell = cell_px_of(size[0], len(labels), pictures_per_row)
    if cell is None:
        return None
    cells = cells_of(cell, num_photos, labels, pictures_per_row)
    return cells if cells.size == size else None


def first_sample(sheet: Image.Image, num_photos: int, labels: Sequence[str], pictures_per_row: int) -> Image.Image:
    """Cut the first sample picture out of a sheet that `grid` drew of these photos and labels, with the title "photos".

    Returns the whole sheet if it is not of the size that such a sheet has.
    """
    if not num_photos or not labels:
        return sheet
    cells = find_cells(sheet.size, num_photos, labels, pictures_per_row)
    return sheet.crop(cells.rows[0][0]) if cells else sheet


def _layout(num_photos: int, title: str, labels: Sequence[str], pictures_per_row: int, cell: int) -> _Layout:
    """Place the photos in lines of the sheet's whole width, and under them as many rows side by side as it holds."""
    columns = _columns(len(labels), pictures_per_row)
    width = columns * (cell + _GAP_PX) - _GAP_PX
    top = _MARGIN_PX
    photos = None
    if num_photos:
        side = min(cell, max(_MIN_PHOTO_PX, (width + _GAP_PX) // num_photos - _GAP_PX))
        photos = _block(_MARGIN_PX, top, _wrap(title, width), width, side, num_photos)
        top = photos.cells[-1][3] + _MARGIN_PX
    rows: list[_Block] = []
    row_width = pictures_per_row * (cell + _GAP_PX) - _GAP_PX
    rows_beside = columns // max(1, pictures_per_row)
    for start in range(0, len(labels), rows_beside):
        wrapped = [_wrap(label, row_width) for label in labels[start : start + rows_beside]]
        height = max(len(lines) for lines in wrapped)
        for place, lines in enumerate(wrapped):
            padded = [*lines, *[""] * (height - len(lines))]
            left = _MARGIN_PX + place * (row_width + _GAP_PX)
            rows.append(_block(left, top, padded, row_width, cell, pictures_per_row))
        top = rows[-1].cells[-1][3] + _MARGIN_PX
    return _Layout(photos, rows, (width + 2 * _MARGIN_PX, top))


def _columns(num_rows: int, pictures_per_row: int) -> int:
    """Return the number of pictures beside each other: as many whole rows as fit into four, or one longer row."""
    if not pictures_per_row:
        return _COLUMNS
    return pictures_per_row * max(1, min(num_rows, _COLUMNS // pictures_per_row))


def _block(left: int, top: int, lines: Sequence[str], width: int, side: int, num_cells: int) -> _Block:
    """Place a label and, below it, square cells of this side in lines of at most this width."""
    first = top + len(lines) * _LINE_PX + _GAP_PX
    per_line = max(1, (width + _GAP_PX) // (side + _GAP_PX))
    return _Block(left, top, lines, list(_cells(left, first, per_line, side, num_cells)))


def _cells(left: int, top: int, per_line: int, side: int, count: int) -> Iterator[Box]:
    for number in range(count):
        line, column = divmod(number, per_line)
        x, y = left + column * (side + _GAP_PX), top + line * (side + _GAP_PX)
        yield x, y, x + side, y + side


def cell_side(picture_px: int) -> int:
    """Return a cell's side for pictures of this side: their least whole multiple of 128 px or more, at most 320 px."""
    return min(picture_px * math.ceil(_MIN_CELL_PX / picture_px), _MAX_CELL_PX)


def fit(picture: Image.Image, cell: int) -> Image.Image:
    """Resize the whole picture so that its longer edge is as long as the cell."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    whole_factor = scale >= 1 and cell % max(picture.size) == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole_factor else Image.Resampling.LANCZOS)


@cache
def label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of the labels on sheets."""
    return ImageFont.load_default(size=_LABEL_PX)


def _wrap(text: str, width_px: int) -> list[str]:
    """Split a label into lines of at most `width_px`; a single word wider than that runs over its block's edge."""
    font = label_font()
    words = text.split()
    lines = []
    while words:
        # A report asks this of every concept, and measuring takes its time: most labels fit whole.
        count = len(words)
        if font.getlength(" ".join(words)) > width_px:
            is_wider = partial(_is_wider, words, width_px)
            count = max(1, bisect_left(range(1, count), True, key=is_wider))
        lines.append(" ".join(words[:count]))
        words = words[count:]
    return lines or [""]


def _is_wider(words: Sequence[str], width_px: int, count: int) -> bool:
    return label_font().getlength(" ".join(words[:count])) > width_px
