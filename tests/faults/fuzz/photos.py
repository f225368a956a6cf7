"""Damaged photos of every format that Pillow writes, decoded as photo and as mask."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.config import PhotoConfig
from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, ByteDamage, damaged, with_right_checksums
from tests.faults.fuzz.outcomes import ROOT, Undocumented, refusal_of
from textual_inversion.errors import BadInput
from textual_inversion.photos import open_mask, open_photo

_SIDE_PX = 48


@dataclass(frozen=True, slots=True)
class PhotoCase:
    """A photo as it is drawn: a whole file by name, its damages, and another file whose end it may get."""

    name: str
    damages: tuple[ByteDamage, ...]
    other: str
    has_right_checksums: bool


def whole_files() -> dict[str, bytes]:
    """Return the demo's photos in every format and mode that Pillow writes, by name."""
    paths = sorted((ROOT / "demo" / "images").rglob("*.png"))[:3]
    pictures = [Image.open(path).convert("RGB").resize((_SIDE_PX, 40)) for path in paths]
    Image.init()
    found = {}
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1"):
            try:
                found[f"{form} {mode}"] = _encoded(pictures[0].convert(mode), form)
            except (OSError, ValueError, KeyError, NotImplementedError):
                continue  # this format has no such mode
    return found | _variants(pictures)


def _variants(pictures: list[Image.Image]) -> dict[str, bytes]:
    """Return files with what few pictures have: metadata, several frames, more bits, compressions, odd shapes."""
    first, *others = pictures
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    several = {"save_all": True, "append_images": others}
    grey16 = Image.fromarray(np.linspace(0, 65535, _SIDE_PX * 40, dtype=np.uint16).reshape(40, _SIDE_PX))
    grey32 = Image.fromarray(np.arange(_SIDE_PX * 40, dtype=np.int32).reshape(40, _SIDE_PX))
    wide = Image.new("1", (3000, 20))
    found = {f"{form} with metadata": _encoded(first, form, exif=exif.tobytes(), icc_profile=profile)
             for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")}  # fmt: skip
    found |= {f"{form} of frames": _encoded(first, form, **several) for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO")}
    found |= {f"TIFF {name}": _encoded(first, "TIFF", compression=name)
              for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")}  # fmt: skip
    found |= {f"{form} of 16 bits": _encoded(grey16, form) for form in ("PNG", "TIFF")}
    return found | {
        "TIFF of 32 bits": _encoded(grey32, "TIFF"),
        "TIFF of floats": _encoded(first.convert("F"), "TIFF"),
        "JPEG progressive": _encoded(first, "JPEG", progressive=True),
        "WEBP lossless": _encoded(first.convert("RGBA"), "WEBP", lossless=True),
        "PNG wide": _encoded(wide, "PNG"),
        "PNG with a transparent colour": _encoded(first.convert("P"), "PNG", transparency=0),
    }


def _encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def photo_area(folder: Path) -> Area:
    """Return the area of photos; it writes nothing into its folder."""
    del folder
    files = whole_files()
    names = st.sampled_from(sorted(files))
    plain = open_photo(files["PNG RGB"])
    max_pixels = PhotoConfig().max_pixels

    def check(case: PhotoCase) -> str:
        data = damaged(files[case.name], case.damages, files[case.other])
        if case.has_right_checksums:
            data = with_right_checksums(data)
        opened: list[Image.Image] = []
        as_photo = refusal_of(lambda: opened.append(open_photo(data, max_pixels)), BadInput)
        as_mask = refusal_of(lambda: open_mask(data, plain, max_pixels), BadInput)
        if as_photo:
            return "refused as photo and mask" if as_mask else "refused as photo"
        (photo,) = opened
        if photo.mode != "RGB" or photo.width * photo.height > max_pixels:
            raise Undocumented(f"a photo of mode {photo.mode}, {photo.width} x {photo.height} px")
        np.asarray(photo)
        return "opened"

    cases = st.builds(
        PhotoCase, name=names, damages=st.lists(BYTE_DAMAGE, max_size=4).map(tuple), other=names,
        has_right_checksums=st.booleans(),
    )  # fmt: skip
    return Area("photos", cases, check)
