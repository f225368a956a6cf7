"""The sample grid: one picture that shows a concept's photos and, under them, a labelled row of samples per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN_PX = 12
_GAP_PX = 4
_LABEL_PX = 14
_MIN_CELL_PX = 128
_MAX_CELL_PX = 320
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)


def grid(
    photos: Sequence[Image.Image], rows: Sequence[tuple[str, Sequence[Image.Image]]], *, title: str = "photos"
) -> Image.Image:
    """Draw the photos under `title`, then each row's pictures under the row's label (its prompt).

    Cells are square, 128 to 320 px: small pictures are enlarged by a whole factor without smoothing, so that the grid
    shows the pixels the model drew; larger ones are reduced. Photos are fitted whole, never cropped. Raises ValueError
    if there is no picture.
    """
    rows = [(title, photos), *rows] if photos else list(rows)
    if not any(pictures for _, pictures in rows):
        raise ValueError("a grid needs at least one picture")
    samples = [picture for _, pictures in rows[1:] or rows for picture in pictures]
    cell = _cell_px(max(max(picture.size) for picture in samples))
    columns = max(len(pictures) for _, pictures in rows)

    font = ImageFont.load_default(size=_LABEL_PX)
    width = 2 * _MARGIN_PX + columns * cell + (columns - 1) * _GAP_PX
    line_px = math.ceil(1.35 * _LABEL_PX)
    labels = [_wrap(label, font, width - 2 * _MARGIN_PX) for label, _ in rows]
    heights = [_row_px(lines, cell) for lines in labels]

    sheet = Image.new("RGB", (width, _MARGIN_PX + sum(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN_PX
    for lines, height, (_, pictures) in zip(labels, heights, rows, strict=True):
        for i, line in enumerate(lines):
            pen.text((_MARGIN_PX, top + i * line_px), line, fill=_INK, font=font)
        for column, picture in enumerate(pictures):
            fitted = _fit(picture.convert("RGB"), cell)
            left = _MARGIN_PX + column * (cell + _GAP_PX) + (cell - fitted.width) // 2
            sheet.paste(fitted, (left, top + height - _MARGIN_PX - cell + (cell - fitted.height) // 2))
        top += height
    return sheet


def first_sample(sheet: Image.Image, num_photos: int, prompts: Sequence[str], pictures_per_prompt: int) -> Image.Image:
    """Cut the first sample picture out of a sheet that `grid` drew of these photos and rows, with the title "photos".

    Returns the whole sheet if it is not of the size that such a sheet has.
    """
    columns = max(num_photos, pictures_per_prompt)
    cell, rest = divmod(sheet.width - 2 * _MARGIN_PX - (columns - 1) * _GAP_PX, columns)
    font = ImageFont.load_default(size=_LABEL_PX)
    labels = [_wrap(label, font, sheet.width - 2 * _MARGIN_PX) for label in ("photos", *prompts)]
    heights = [_row_px(lines, cell) for lines in labels]
    if not prompts or not num_photos or rest or sheet.height != _MARGIN_PX + sum(heights):
        return sheet
    bottom = _MARGIN_PX + sum(heights[:2]) - _MARGIN_PX
    return sheet.crop((_MARGIN_PX, bottom - cell, _MARGIN_PX + cell, bottom))


def _row_px(lines: Sequence[str], cell: int) -> int:
    """Return the height of a row with a label of these lines."""
    return len(lines) * math.ceil(1.35 * _LABEL_PX) + _GAP_PX + cell + _MARGIN_PX


def _cell_px(picture_px: int) -> int:
    """Return a cell's side for pictures of this side: their least whole multiple of 128 px or more, at most 320 px."""
    return min(picture_px * math.ceil(_MIN_CELL_PX / picture_px), _MAX_CELL_PX)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Resize the whole picture so that its longer edge is as long as the cell."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    whole_factor = scale >= 1 and cell % max(picture.size) == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole_factor else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Split a label into lines of at most `width_px`; a single word wider than that runs over the sheet's edge."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
