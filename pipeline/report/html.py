"""Parts that all pages share: templates, style and scripts inside a page, and pictures."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from textual_inversion.photos import open_preview

JINJA = jinja2.Environment(
    loader=jinja2.PackageLoader("pipeline.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)

_SCRIPTS = ("elements.js", "pictures.js", "viewer.js")
"""Scripts of every page that has any."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Style and script of a page, and the policy by which a browser runs this script and no other.

    The policy is the second defence: texts of manifests are escaped, and one that came through would still be neither
    run nor able to load anything from elsewhere.
    """

    policy: str
    """Content of the `Content-Security-Policy`."""
    style: Markup
    script: Markup
    """Empty for a page without scripts."""

    @classmethod
    def of(cls, *scripts: str) -> Frame:
        """Return the frame of a page with these scripts; without any, of a page that runs none.

        Beside inline scripts, a page may load scripts and pictures that lie where it lies: its parts, and the run's
        pictures.
        """
        style = _source("page.css")
        script = "\n".join(_source(name) for name in (*_SCRIPTS, *scripts)) if scripts else ""
        allowed = f"script-src 'self' '{_digest(script)}'" if scripts else "script-src 'none'"
        policy = f"default-src 'none'; img-src 'self' data: blob:; style-src '{_digest(style)}'; {allowed}"
        return cls(policy, Markup(style), Markup(script))  # both are this package's own files


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside the page, or a note that says why it cannot be shown."""

    data_uri: str = ""
    width: int = 0
    height: int = 0
    note: str = ""
    full_size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the object that it was made from."""


def embed(data: bytes, side_px: int, max_pixels: int) -> Picture:
    """Return a picture as a WebP data URI, with its longer side at most `side_px` pixels.

    Raises ValueError if it is no picture, or has more than `max_pixels` pixels.
    """
    preview = open_preview(data, side_px, max_pixels)
    with Image.open(io.BytesIO(data)) as found:  # reads the header alone
        full_size = found.size
    buffer = io.BytesIO()
    preview.save(buffer, "WEBP", quality=82, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{text}", *preview.size, full_size=full_size)


def to_script(value: object) -> Markup:
    """Return a JSON value as text that can stand inside a script element: no text in it can end the element."""
    return htmlsafe_json_dumps(value, separators=(",", ":"), allow_nan=False)


def _source(name: str) -> str:
    assert JINJA.loader is not None
    return JINJA.loader.get_source(JINJA, name)[0]


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
