"""Build an atlas of cut-outs from openly licensed art: fetch the npm packages, draw the SVGs, trim and scale.

The atlas holds RGBA sprites of `SPRITE_PX` on their longer side, and is built once into the work folder; importing the
world and using the committed model and pictures need none of it.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from demo.objects import EXCLUDED_GROUPS, HELD_OUT, TRAINING, WorldObject

SPRITE_PX = 128
ICON_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
"""Art sets kept as SVG in one JSON file each. `openmoji` is never shown to the model: it is the style concept."""
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "unicode-emoji-json@0.9.0"
ART_SETS = (*ICON_PACKAGES, "fluent")

Sprite = Image.Image


@dataclass(frozen=True, slots=True)
class Atlas:
    """Cut-outs by art set and slug."""

    sprites: dict[tuple[str, str], Sprite]

    def sprite(self, art_set: str, slug: str) -> Sprite:
        """Return the RGBA cut-out of one object in one art set."""
        return self.sprites[art_set, slug]


def _archive(package: str, folder: Path) -> Path:
    """Return the .tgz of an npm package, fetched into `folder` if it is missing."""
    name, _, version = package.rpartition("@")
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


def _read_members(path: Path, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Return file name inside `package/` -> content, for members that end in one of the suffixes."""
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("package/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and member.name.endswith(suffixes)
        }


def _trim(image: Image.Image) -> Sprite:
    """Crop to the visible part and scale the longer side to `SPRITE_PX`."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    image = image.crop(box)
    scale = SPRITE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_icon(icons: dict, slug: str) -> Sprite:
    """Render one iconify entry at twice the sprite size."""
    import resvg_py

    parent = icons["icons"].get(slug) or icons["icons"][icons["aliases"][slug]["parent"]]
    width = parent.get("width", icons.get("width", 16))
    height = parent.get("height", icons.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{parent["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_PX, height=2 * SPRITE_PX))
    return _trim(Image.open(io.BytesIO(png)).convert("RGBA"))


def _fluent_sprite(files: dict[str, bytes], emoji: str) -> Sprite:
    """Return the Fluent 3D picture of an emoji; files are named by code points, with or without variation selector."""
    code = "-".join(f"{ord(char):x}" for char in emoji)
    bare = code.replace("-fe0f", "")
    for stem in (code, bare, f"{bare}-fe0f"):
        content = files.get(f"assets/{stem}.webp")
        if content is not None:
            return _trim(Image.open(io.BytesIO(content)).convert("RGBA"))
    raise KeyError(emoji)


def _all_objects() -> list[WorldObject]:
    return [*TRAINING, *(held.object for held in HELD_OUT)]


def _build(folder: Path) -> dict[tuple[str, str], Sprite]:
    names = json.loads(_read_members(_archive(NAMES_PACKAGE, folder), ("data-by-emoji.json",))["data-by-emoji.json"])
    emoji_of = {entry["slug"].replace("_", "-"): emoji for emoji, entry in names.items()}
    sprites: dict[tuple[str, str], Sprite] = {}
    for art_set, package in ICON_PACKAGES.items():
        icons = json.loads(_read_members(_archive(package, folder), ("package/icons.json",))["icons.json"])
        for thing in _all_objects():
            sprites[art_set, thing.slug] = _draw_icon(icons, thing.slug)
    fluent = _read_members(_archive(FLUENT_PACKAGE, folder), (".webp",))
    for thing in _all_objects():
        emoji = emoji_of[thing.slug]
        if names[emoji]["group"] in EXCLUDED_GROUPS:
            raise ValueError(f"{thing.slug} is in the excluded group {names[emoji]['group']}")
        sprites["fluent", thing.slug] = _fluent_sprite(fluent, emoji)
    return sprites


def load_atlas(work: Path) -> Atlas:
    """Load the atlas of all training and held-out objects, cached as one .npz in the work folder."""
    path = work / "atlas.npz"
    if not path.exists():
        sprites = _build(work / "npm")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **{f"{art}/{slug}": np.asarray(image) for (art, slug), image in sprites.items()})
        temporary.rename(path)
    with np.load(path) as stored:
        images = {tuple(key.split("/")): Image.fromarray(stored[key]) for key in stored.files}
    return Atlas(sprites=images)  # type: ignore[arg-type]
