"""Files that claim much, or keep a decoder busy; and files that are no picture."""

from __future__ import annotations

import struct
import sys
import types
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.textual_inversion.test_photos import encoded, wide
from textual_inversion import picture_files
from textual_inversion.photos import open_photo
from textual_inversion.picture_files import read_header

HEIC = b"\x00\x00\x00\x18ftypheic" + bytes(4) + b"mif1heic" + bytes(40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nothing", r"not a picture in any known format \(7 bytes, starting b'nothing'\); known: JPEG, "),
        (b"<html>no</html>", r"a web page \(HTML, 15 bytes\): the address may lead to"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><title>Log in</title>", "a web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "PostScript files are not decoded; save"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG files are not decoded"),
        (b"\xff\x0a" + bytes(40), "JPEG XL files are not decoded"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL files"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000 files"),
        (encoded(Image.new("1", (20_000, 20_000))), "too large: above 178,956,970 px; at most 100,000,000 px"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_header(data, "photo")


def without_pillow_heif(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", module)  # type: ignore[arg-type]  # None stands for a missing one
    monkeypatch.setattr(picture_files, "_can_open_heif", picture_files._can_open_heif.__wrapped__)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1"])
def test_heic_without_its_package_names_it(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pillow_heif(monkeypatch, None)
    with pytest.raises(ValueError, match="a HEIC picture, which is decoded where the package pillow-heif"):
        read_header(HEIC.replace(b"ftypheic", b"ftyp" + brand), "photo")


def test_heic_is_decoded_where_its_package_is_installed() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(wide().resize((300, 200)), "HEIF", exif=exif.tobytes())
    opened = open_photo(data)
    assert opened.size == (200, 300)
    assert opened.getpixel((100, 20))[0] > 240
    assert opened.getpixel((100, 270))[2] > 240
    with pytest.raises(ValueError, match="damaged or cut short"):
        open_photo(data[: len(data) // 2])


def claiming(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims a size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in chunks.items())


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 100_000, 2**31 - 1])
def test_a_bomb_is_told_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="too large"):
        open_photo(claiming(side, side))


@pytest.mark.parametrize(("form", "limit"), [("PNG", 599), ("WEBP", 1199), ("AVIF", 1199)])
def test_pixels_count_twice_where_a_decoder_takes_more_memory(form: str, limit: int) -> None:
    data = encoded(wide(), form)
    with pytest.raises(ValueError, match="too large: 30 x 20 px; at most 599 px"):
        read_header(data, "photo", max_pixels=limit)
    assert read_header(data, "photo", max_pixels=limit + 1).size == (30, 20)


def test_pils_own_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        read_header(encoded(wide()), "photo")


def with_scans(number: int, in_comment: bool = False) -> bytes:
    """Return a progressive JPEG whose last scan is repeated until it has so many, or a comment that holds them."""
    data = encoded(wide(), "JPEG", progressive=True, restart_marker_blocks=1)
    last = data.rfind(b"\xff\xda")
    more = data[last:-2] * (number - data.count(b"\xff\xda"))
    if in_comment:
        return data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(more)) + more + data[2:]
    return data[:last] + more + data[last:]


def test_scans_of_a_jpeg_are_bounded() -> None:
    assert open_photo(with_scans(100)).size == (30, 20)
    with pytest.raises(ValueError, match="the JPEG has more than 100 scans"):
        open_photo(with_scans(101))
    assert open_photo(with_scans(150, in_comment=True)).size == (30, 20)


def many_segments(form: str, number: int) -> bytes:
    """Return a picture with so many segments or chunks of no content."""
    data = encoded(wide(), form)
    if form == "JPEG":
        return data[:2] + b"\xff\xfe\0\2" * number + data[2:]
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk(b"IDAT", b"") * number + data[place:]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pieces_of_a_file_are_bounded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MAX_READS", 5000)
    assert open_photo(many_segments(form, 500)).size == (30, 20)
    with pytest.raises(ValueError, match="in more than 5,000 pieces"):
        open_photo(many_segments(form, 5000))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_big", [False, True])
def test_values_of_a_tiff_tag_are_bounded(order: str, is_big: bool) -> None:
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if is_big else 42)
    head = struct.pack(f"{order}HHQ", 8, 0, 16) if is_big else struct.pack(f"{order}I", 8)
    entry = f"{order}HHQQ" if is_big else f"{order}HHII"
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (273, 4, 60_000, 400), (700, 7, 10**6, 400)]
    directory = struct.pack(f"{order}Q" if is_big else f"{order}H", len(entries))
    data = magic + head + directory + b"".join(struct.pack(entry, *each) for each in entries) + bytes(300_000)
    with pytest.raises(ValueError, match="the TIFF has a tag of more than 50,000 values"):
        open_photo(data)
