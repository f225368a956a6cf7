"""The preview strip: one picture that shows a concept at several steps of its learning, under the steps' numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, PngImagePlugin

from textual_inversion.grids import Box, cell_side, fit, label_font

MAX_PICTURES = 40
"""Largest number of pictures on a strip. When there are more, every second one is left out."""

_COLUMNS = 6
_MARGIN_PX = 12
_GAP_PX = 4
_LABEL_PX = 18
_STEPS = "steps"
"""Name of the PNG's text with the steps of its pictures, separated by commas."""
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)


@dataclass(frozen=True, slots=True)
class Strip:
    """The previews of one concept."""

    pictures: Mapping[int, Image.Image] = field(default_factory=dict)
    """Step -> picture as it stands on the strip, in the order of steps; all are squares of one side."""

    @property
    def cell_px(self) -> int:
        """Side of the pictures; 0 if there are none."""
        return next((picture.width for picture in self.pictures.values()), 0)

    def with_picture(self, step: int, picture: Image.Image) -> Strip:
        """Return the strip with one more picture, in the place of an earlier one of the same step."""
        side = self.cell_px or cell_side(max(picture.size))
        found = {**self.pictures, step: fit(picture.convert("RGB"), side)}
        steps = sorted(found)
        if len(steps) > MAX_PICTURES:
            steps = [*steps[:-1:2], steps[-1]]
        return Strip({step: found[step] for step in steps})

    def until(self, step: int) -> Strip:
        """Return the strip without the pictures of later steps."""
        return Strip({each: picture for each, picture in self.pictures.items() if each <= step})

    def to_png(self) -> bytes:
        """Return the strip as the bytes of a PNG file. Raises ValueError if it has no picture."""
        size, boxes = strip_cells(self.cell_px, len(self.pictures))
        sheet = Image.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(sheet)
        for (left, top, _, _), (step, picture) in zip(boxes, self.pictures.items(), strict=True):
            pen.text((left, top - _LABEL_PX), f"step {step}", fill=_INK, font=label_font())
            sheet.paste(picture, (left, top))
        texts = PngImagePlugin.PngInfo()
        texts.add_text(_STEPS, ",".join(map(str, self.pictures)))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", pnginfo=texts)
        return buffer.getvalue()

    @classmethod
    def from_png(cls, data: bytes) -> Strip:
        """Read what `to_png` wrote. Raises ValueError or OSError if the bytes are not those of a strip."""
        with Image.open(io.BytesIO(data), formats=["PNG"]) as sheet:
            steps = [int(step) for step in str(sheet.info.get(_STEPS, "")).split(",")]
            across = min(len(steps), _COLUMNS)
            side = (sheet.width - 2 * _MARGIN_PX + _GAP_PX) // across - _GAP_PX
            if len(steps) > MAX_PICTURES or side < 1 or strip_cells(side, len(steps))[0] != sheet.size:
                raise ValueError(f"a picture of {sheet.width} x {sheet.height} px is no strip of {len(steps)} previews")
            boxes = strip_cells(side, len(steps))[1]
            return cls({step: sheet.crop(box) for step, box in zip(steps, boxes, strict=True)})


def strip_cells(cell_px: int, count: int) -> tuple[tuple[int, int], Sequence[Box]]:
    """Return the size in px of a strip of `count` pictures of this side, and their places.

    Raises ValueError without a picture.
    """
    if count < 1 or cell_px < 1:
        raise ValueError("a strip needs at least one picture")
    across = min(count, _COLUMNS)
    pitch = cell_px + _GAP_PX
    line_px = _LABEL_PX + pitch
    boxes = []
    for number in range(count):
        line, column = divmod(number, across)
        left, top = _MARGIN_PX + column * pitch, _MARGIN_PX + line * line_px + _LABEL_PX
        boxes.append((left, top, left + cell_px, top + cell_px))
    lines = math.ceil(count / across)
    return (2 * _MARGIN_PX + across * pitch - _GAP_PX, 2 * _MARGIN_PX + lines * line_px - _GAP_PX), boxes
