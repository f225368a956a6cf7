"""A manifest with every mistake that a manifest can have, and the documented outcome of each row."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Outcome = Literal["fixed", "bad row", "failed"]
"""Outcome of a row: learned; refused before any attempt; attempted and recorded as failed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the manifest. `said` is a part of the reason given, and empty if the concept is learned."""

    name: str
    outcome: Outcome
    said: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    """Columns that differ from those of a good row."""
    photo: bytes | None = None
    """Content of the row's second photo, where the photo is the mistake."""
    suffix: str = "png"


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((48, 40), Image.Resampling.NEAREST).convert(mode)


def claiming(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims this size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif.tobytes())


def palette_with_alpha() -> bytes:
    return encoded(picture(mode="P"), "PNG", transparency=bytes(range(256)))


def odd_photos() -> list[Case]:
    frames = [picture(seed) for seed in range(3)]
    animated = {
        form: encoded(frames[0], form, save_all=True, append_images=frames[1:]) for form in ("GIF", "PNG", "WEBP")
    }
    grey16 = Image.fromarray(np.linspace(0, 65535, 48 * 40, dtype=np.uint16).reshape(40, 48))
    good = {
        "exif-rotated": rotated(), "cmyk": encoded(picture(mode="CMYK"), "JPEG"), "grey-16-bit": encoded(grey16, "PNG"),
        "palette-with-alpha": palette_with_alpha(), "rgba": encoded(picture(mode="RGBA"), "PNG"),
        "one-bit": encoded(picture(mode="1"), "PNG"), "bmp": encoded(picture(), "BMP"),
        "tiff": encoded(picture(), "TIFF"), "long": encoded(Image.new("1", (1600, 16)), "PNG"),
        **{f"animated-{form.lower()}": data for form, data in animated.items()},
    }  # fmt: skip
    whole = {form: encoded(picture(), form) for form in ("JPEG", "PNG", "WEBP", "GIF")}
    bad = {
        **{f"truncated-{form.lower()}": (data[: len(data) // 2], "") for form, data in whole.items()},
        "bomb": (claiming(60_000, 60_000), "too large: above"),
        "11000-px": (claiming(11_000, 11_000), "too large: 11000 x 11000 px; at most 100,000,000"),
        "20000-px": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "too large"),
        "1x1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "the photo is 1 x 1 px; at least 16"),
        "thin": (encoded(Image.new("1", (16, 600_000)), "PNG"), "its longer side may be 100 times"),
        "empty": (b"", "the photo is empty (0 bytes)"),
        "html": (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG files are not decoded"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript files are not decoded"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC picture"),
        "pickle": (b"\x80\x04cos\nsystem\n.", "not a picture in any known format"),
        "float": (encoded(picture().convert("F"), "TIFF"), "floating-point numbers"),
    }
    fixed = [Case(name=name, outcome="fixed", photo=data, suffix="jpg") for name, data in good.items()]
    return fixed + [
        Case(name=name, outcome="failed", said=said or "or cut short", photo=data, suffix="jpg")
        for name, (data, said) in bad.items()
    ]


def odd_addresses(folder: Path) -> list[Case]:
    addresses = {
        "missing": ("photos/absent.png", "photo .* cannot be read: FileNotFoundError"),
        "a-folder": (str(folder), "a folder, or no plain file"),
        "a-device": ("/dev/zero", "a folder, or no plain file"),
        "other-scheme": ("ssh://me:SeCrEt@host/1.png", "begins with ssh://; allowed are file"),
        "chained": ("simplecache::file:///x.png", "is a chained URL"),
        "loopback": ("http://127.0.0.1:9/1.png?sig=SeCrEt", "127.0.0.1 is no public address; photos.private_networks"),
        "metadata-service": ("http://169.254.169.254/latest/", "169.254.169.254 is no public address"),
        "not-an-address": ("http://", "not, or does not lead to, an address"),
        "line-in-address": ("photos/a\n.png", "control character"),
        "long-address": ("a" * 5000, "5,000 characters, more than 4,000"),
        "no-address": ("", "images holds an empty or missing address"),
        "null-address": (None, "images holds an empty or missing address"),
    }
    cases = [
        Case(name=name, outcome="bad row", said=said, row={"images": ["photos/good.png", address]})
        for name, (address, said) in addresses.items()
    ]
    return [
        *cases,
        Case(name="no-images", outcome="bad row", said="has no images", row={"images": []}),
        Case(name="null-images", outcome="bad row", said="has no images", row={"images": None}),
    ]


def odd_ids() -> list[Case]:
    ids = {
        "null-id": None, "empty-id": "", "up": "../up", "up-and-up": "../../../../etc/cron.d/x", "slash": "a/b",
        "backslash": "a\\b", "root": "/etc/passwd", "hidden": ".hidden", "dots": "..", "control": "a\x00b",
        "terminal": "a\x1b[2Jb", "300-characters": "x" * 300, "spaces": "two words", "accents": "été",
        "percent": "%2e%2e",
    }  # fmt: skip
    cases = [
        Case(name=name, outcome="bad row", said="must be 1 to 128 letters", row={"concept_id": value})
        for name, value in ids.items()
    ]
    return [
        *cases,
        Case(name="twice", outcome="bad row", said="occurs in an earlier row", row={"concept_id": "good-1"}),
    ]


def odd_texts() -> list[Case]:
    def case(name: str, outcome: Outcome, said: str = "", **row: Any) -> Case:
        return Case(name=name, outcome=outcome, said=said, row=row)

    return [
        case("placeholder-in-vocabulary", "failed", "a word of the model's own vocabulary", placeholder="cat"),
        case("placeholder-in-a-prompt", "failed", "such as '<photo>'", placeholder="photo"),
        case("placeholder-inside-another", "fixed", placeholder="<good>s"),
        case("placeholder-shared", "fixed", placeholder="<good>"),
        case("placeholder-pattern", "fixed", placeholder=".*(["),
        case("placeholder-blank", "fixed", placeholder="  "),
        case("placeholder-two-words", "bad row", "must be one word", placeholder="two words"),
        case("placeholder-hole", "bad row", "which is the concept's place", placeholder="{}"),
        case("placeholder-long", "bad row", "more than 200", placeholder="<" + "a" * 300 + ">"),
        case("placeholder-bell", "bad row", "control character", placeholder="<a\x07>"),
        case("initializer-spelled-out", "fixed", initializer="xqzvbnmk"),
        case("initializer-none", "fixed", initializer=None),
        case("initializer-blank", "fixed", initializer=" "),
        case("initializer-nothing", "failed", "has no token for something in", initializer="<|endoftext|>"),
        case("initializer-too-long", "failed", "that fit; shorten the prompt", initializer="cat dog toy tree " * 6),
        case("initializer-hole", "bad row", "which is the concept's place", initializer="a {}"),
        case("too-many-vectors", "failed", "shorten the prompt or use fewer vectors", num_vectors=30),
        case("far-too-many-vectors", "bad row", "at most 512", num_vectors=10**9),
        case("no-vectors", "bad row", "must be at least 1", num_vectors=0),
        case("half-a-vector", "bad row", "must be a whole number", num_vectors=1.5),
        case("nan-vectors", "fixed", num_vectors=float("nan")),
        case("category", "bad row", "category 'person'", category="person"),
        case("captions-hole", "bad row", "has no {}, as a word", captions=["a cat", "a cat"]),
        case("captions-fewer", "bad row", "1 captions for 2 images", captions=["a {}"]),
        case("captions-null", "bad row", "captions holds an empty or missing text", captions=["a {}", None]),
        case("captions-too-long", "failed", "that fit; shorten", captions=["a {}", "a {} " + "on the beach " * 9]),
        case("captions-end", "failed", "has no token for something in", captions=["a {}", "a {} <|endoftext|>"]),
        case("masks-fewer", "bad row", "1 masks for 2 images", masks=["photos/good.png"]),
        case("masks-missing", "bad row", "mask .* cannot be read", masks=["photos/good.png", "photos/absent.png"]),
        case("large-column", "bad row", "drop large ones", note="x" * 70_000),
    ]


NEIGHBOURS = ("good-0", "good-1", "good-2")


def write_corpus(folder: Path) -> tuple[str, list[Case]]:
    """Write a manifest with good concepts at its beginning, middle and end; return its path and its rows in order."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    (photos / "good.png").write_bytes(encoded(picture(7), "PNG"))
    good = [Case(name=name, outcome="fixed", photo=encoded(picture(9), "PNG")) for name in NEIGHBOURS]
    odd = [*odd_photos(), *odd_addresses(folder), *odd_texts()]
    cases = [good[0], *odd[::2], good[1], *odd[1::2], *odd_ids(), good[2]]
    rows = []
    for case in cases:
        if case.photo is not None:
            (photos / f"{case.name}.{case.suffix}").write_bytes(case.photo)
        second = "good.png" if case.photo is None else f"{case.name}.{case.suffix}"
        images = ["photos/good.png", f"photos/{second}"]
        rows.append({"concept_id": case.name, "images": images, "initializer": "cat", **case.row})
    return write_rows(folder, rows), cases


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    if "num_vectors" in columns:
        columns["num_vectors"] = pa.array(
            [None if v is None else float(v) for v in columns["num_vectors"]], pa.float64()
        )
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)
