"""Templates of the pages, and pictures inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import jinja2
from PIL import Image, ImageOps

from textual_inversion.photos import read_header

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
    with read_header(data, "picture", max_pixels) as found:
        found.draft("RGB", (side_px, side_px))  # decodes a JPEG at a fraction of its size
        picture: Image.Image = ImageOps.exif_transpose(found).convert("RGBA")
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture.getchannel("A"))
    paper.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    paper.save(buffer, "WEBP", quality=82, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{text}", *paper.size)
