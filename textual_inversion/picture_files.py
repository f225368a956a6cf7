"""Open pictures that strangers send: name what the bytes are, and bound what decoding them may cost.

All is judged before a pixel is decoded: a file of a few kilobytes can claim any size, and one of a few megabytes can
keep a decoder busy for hours.
"""

from __future__ import annotations

import importlib
import re
import struct
from functools import cache
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from textual_inversion.errors import BadInput, first_line

MAX_PIXELS = 100_000_000
"""Largest number of pixels that is decoded. Larger pictures are refused by their header."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are decoded (AVIF where PIL can). PIL reads many more, and starts another program for one (EPS)."""

MAX_JPEG_SCANS = 100
"""Largest number of scans of a JPEG. Progressive ones have about ten, and every scan passes over all pixels again."""

MAX_READS = 50_000
"""Largest number of reads by a decoder, which reads once or a few times for each segment or chunk of a file."""

MAX_TIFF_VALUES = 50_000
"""Largest number of values of a numeric tag of a TIFF, such as the offsets of its strips."""

_PIXELS_OF_FORMAT = {"WEBP": 2, "AVIF": 2, "HEIF": 2}
"""Number that a pixel counts as in formats whose decoders take up to 25 bytes a pixel; the others take up to 17."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEIF_ADVICE = (
    "a HEIC picture, which is decoded where the package pillow-heif is installed (the extra `heif` of this project); "
    "install it on every node, or save the picture as JPEG, PNG or WebP"
)
_KNOWN_STARTS = {
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"v/1\x01": "OpenEXR",
    b"#?radiance": "Radiance HDR",
}
"""Names of kinds of files that are not decoded, by their first bytes in lower case for text."""

_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""Marker of a JPEG other than a restart, also after coded data, in which 0xFF is followed by 0 or a restart."""
_BYTE_TYPES = (1, 2, 6, 7)
"""Types of TIFF tags whose values are bytes or text."""


class _BoundedReads(BytesIO):
    """The bytes of a picture, which a decoder may read in so many pieces and no more."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise BadInput(f"the picture is in more than {MAX_READS:,} pieces, which no camera or editor writes")
        return super().read(size)


def read_header(data: bytes, kind: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture without decoding its pixels, which may still fail later. `kind` names the picture in messages.

    Raises BadInput unless the picture is in one of the `FORMATS`, or a HEIC and pillow-heif is installed, has at most
    `max_pixels` (half as many for WebP, AVIF and HEIC, whose decoders take more memory), and is built as cameras and
    editors build them (`MAX_JPEG_SCANS`, `MAX_READS`, `MAX_TIFF_VALUES`).
    """
    if not data:
        raise BadInput(f"the {kind} is empty (0 bytes)")
    _check_structure(data)
    try:
        picture = Image.open(_BoundedReads(data), formats=_formats_for(data))
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(_unknown(data)) from None
    except Image.DecompressionBombError as error:
        raise BadInput(_too_large(f"above {2 * (Image.MAX_IMAGE_PIXELS or 0):,} px", max_pixels)) from error
    except Exception as error:  # PIL's readers raise errors of nearly every type on damaged files
        raise damaged(data, error) from error
    limit = max_pixels // _PIXELS_OF_FORMAT.get(picture.format or "", 1)
    if picture.width * picture.height > limit:
        raise BadInput(_too_large(f"{picture.width} x {picture.height} px", limit))
    return picture


def damaged(data: bytes, error: Exception) -> BadInput:
    """Return the error for a picture whose decoder failed."""
    return BadInput(f"the picture is damaged or cut short ({len(data)} bytes): {first_line(error)}")


@cache
def _decodable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _formats_for(data: bytes) -> tuple[str, ...]:
    return ("HEIF",) if _is_heif(data) and _can_open_heif() else _decodable_formats()


def _is_heif(data: bytes) -> bool:
    """Return whether the bytes are a HEIC or another HEIF that is no AVIF."""
    is_heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS
    return is_heif and b"avif" not in data[12 : int.from_bytes(data[:4], "big")][:200]


@cache
def _can_open_heif() -> bool:
    """Return whether PIL opens HEIC here; makes it do so if pillow-heif is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError:
        return False
    return True


def _check_structure(data: bytes) -> None:
    """Raise BadInput for a JPEG of too many scans and a TIFF of too many values, which take hours to decode."""
    if data[:2] == b"\xff\xd8" and _jpeg_scans(data) > MAX_JPEG_SCANS:
        raise BadInput(f"the JPEG has more than {MAX_JPEG_SCANS} scans, each over all its pixels; save it anew")
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and _most_tiff_values(data) > MAX_TIFF_VALUES:
        raise BadInput(f"the TIFF has a tag of more than {MAX_TIFF_VALUES:,} values; save it anew, in larger strips")


def _jpeg_scans(data: bytes) -> int:
    """Return the scans of a JPEG's first picture, and `MAX_JPEG_SCANS` + 1 for any more; ISO/IEC 10918-1, B.1."""
    scans = 0
    position = 2
    while scans <= MAX_JPEG_SCANS and (found := _JPEG_MARKER.search(data, position)):
        marker = found[1][0]
        position = found.end()
        if marker == 0xD9:  # end of image
            break
        if marker not in (0x01, 0xD8):  # all others are followed by their length
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        scans += marker == 0xDA
    return scans


def _most_tiff_values(data: bytes) -> int:
    """Return the greatest number of values of a numeric tag in a TIFF's first directory; TIFF 6.0, section 2."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count_format, entry_format = (f"{order}Q", f"{order}HHQQ") if is_big else (f"{order}H", f"{order}HHII")
    entry_bytes = struct.calcsize(entry_format)
    try:
        (offset,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)
        (entries,) = struct.unpack_from(count_format, data, offset)
        start = offset + struct.calcsize(count_format)
        tags = struct.iter_unpack(entry_format, data[start : start + min(entries, 2**16) * entry_bytes])
        return max((count for _, kind, count, _ in tags if kind not in _BYTE_TYPES), default=0)
    except struct.error:  # cut short, as its decoder will say
        return 0


def _unknown(data: bytes) -> str:
    """Return a message that says what the bytes hold, where their beginning tells."""
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return (
            f"not a picture but a web page (HTML, {len(data)} bytes): the address may lead to a page about the photo, "
            "to a login or to an error"
        )
    if _is_heif(data):
        return f"the HEIC picture is damaged or cut short ({len(data)} bytes)" if _can_open_heif() else _HEIF_ADVICE
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "an AVIF picture, which Pillow decodes from release 11.3 on; update it, or save the picture as JPEG"
    for beginning, name in _KNOWN_STARTS.items():
        if data.startswith(beginning) or start.startswith(beginning.lower()):
            return f"{name} files are not decoded; save the picture as JPEG, PNG or WebP"
    return f"not a picture in any known format ({len(data)} bytes, starting {data[:8]!r}); known: {', '.join(FORMATS)}"


def _too_large(size: str, limit: int) -> str:
    return f"the picture is too large: {size}; at most {limit:,} px are decoded, scale it down first"
