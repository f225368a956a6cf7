"""Templates of the pages, and pictures inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import jinja2

from textual_inversion.photos import open_preview

JINJA = jinja2.Environment(
    loader=jinja2.PackageLoader("pipeline.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside the page, or a note that says why it cannot be shown."""

    data_uri: str = ""
    width: int = 0
    height: int = 0
    note: str = ""


def embed(data: bytes, side_px: int, max_pixels: int) -> Picture:
    """Return a picture as a WebP data URI, with its longer side at most `side_px` pixels.

    Raises ValueError if it is no picture, or has more than `max_pixels` pixels.
    """
    preview = open_preview(data, side_px, max_pixels)
    buffer = io.BytesIO()
    preview.save(buffer, "WEBP", quality=82, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{text}", *preview.size)
