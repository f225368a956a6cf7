"""Photos as a script hands them over: a folder, files, or decoded pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from textual_inversion.errors import BadInput
from textual_inversion.photos import open_photo

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Endings of files that are photos; what is in them is looked at when they are opened."""

Photos = str | Path | Iterable[str | Path | Image.Image]


def read_photos(photos: Photos) -> list[Image.Image]:
    """Return decoded photos in RGB: those of a folder, in the order of their names, or the ones listed.

    Raises BadInput if there is none, naming the place, and for a file that is no photo (`open_photo`).
    """
    if isinstance(photos, str | Path):
        path = Path(photos).expanduser()
        listed: list[str | Path | Image.Image] = [*_files_in(path)] if path.is_dir() else [path]
        if not listed:
            raise BadInput(f"{path} has no photos, files that end with {', '.join(SUFFIXES)}")
    else:
        listed = list(photos)
        if not listed:
            raise BadInput("no photos; give 3 to 5 of the thing to learn")
    return [_in_rgb(each) if isinstance(each, Image.Image) else _read(Path(each).expanduser()) for each in listed]


def _files_in(folder: Path) -> list[Path]:
    inside = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] not in "._")
    return sorted(inside)


def _read(path: Path) -> Image.Image:
    try:
        return open_photo(path.read_bytes())
    except OSError as error:
        raise BadInput(f"photo {path} cannot be read: {error.strerror}") from error
    except BadInput as error:
        raise BadInput(f"photo {path}: {error}") from error


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        raise BadInput("a picture with transparent pixels; lay it on a background, or give the path of its file")
    return picture.convert("RGB")
