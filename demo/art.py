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
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
}
"""Art sets kept as SVG in one JSON file each."""
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "unicode-emoji-json@0.9.0"
TRAINING_SETS = ("noto", "twemoji", "fluent", "noto-v1", "emojione", "fluent-flat")
"""Art sets shown to the model. Captions name the four of `REQUIRED_SETS`; the two others draw unnamed objects."""
REQUIRED_SETS = ("noto", "twemoji", "fluent", "fluent-flat")
"""Art sets that hold every object; the others lack some of the newer ones."""
HELD_OUT_SETS = ("openmoji", "emojione-v1")
"""Art sets never shown to the model: the style concepts, both under share-alike licences. OpenMoji is outlined in
black, as no other set is. EmojiOne 1 has muted colours and flat facets, and draws 272 of the taught objects; Firefox OS
Emoji was the alternative: it has 226 of their names, and looks like Twemoji and Fluent flat."""
ART_SETS = (*TRAINING_SETS, *HELD_OUT_SETS)
_UNFIT_DRAWINGS = {
    "emojione": "desert-island motorcycle snow-capped-mountain tent",
    "openmoji": "scroll",
    "emojione-v1": "backpack building-construction carousel-horse castle desert-island factory ferris-wheel fountain"
    " japanese-castle keyboard rainbow roller-coaster running-shoe shield ship snow-capped-mountain tent tokyo-tower"
    " window",
}
"""Slugs left out of an art set: its drawing fills a frame with a scene, shows a rider, or shows another thing."""

Sprite = Image.Image


@dataclass(frozen=True, slots=True)
class Atlas:
    """Cut-outs by art set and slug."""

    sprites: dict[tuple[str, str], Sprite]

    def has(self, art_set: str, slug: str) -> bool:
        """Return True if the art set holds the object."""
        return (art_set, slug) in self.sprites

    def sprite(self, art_set: str, slug: str) -> Sprite:
        """Return the RGBA cut-out of one object in one art set. Raises KeyError if the set does not hold it."""
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


def _find_icon(icons: dict, slug: str) -> dict | None:
    """Return the iconify entry of a slug, or None if the set has none or only one that is another icon turned."""
    alias = icons.get("aliases", {}).get(slug, {})
    if alias.keys() - {"parent"}:
        return None
    return icons["icons"].get(alias.get("parent", slug))


def _draw_icon(icons: dict, icon: dict) -> Sprite:
    """Render one iconify entry at twice the sprite size."""
    import resvg_py

    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
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
            icon = _find_icon(icons, thing.slug)
            if icon is not None and thing.slug not in _UNFIT_DRAWINGS.get(art_set, "").split():
                sprites[art_set, thing.slug] = _draw_icon(icons, icon)
    fluent = _read_members(_archive(FLUENT_PACKAGE, folder), (".webp",))
    for thing in _all_objects():
        emoji = emoji_of[thing.slug]
        if names[emoji]["group"] in EXCLUDED_GROUPS:
            raise ValueError(f"{thing.slug} is in the excluded group {names[emoji]['group']}")
        sprites["fluent", thing.slug] = _fluent_sprite(fluent, emoji)
        for art_set in REQUIRED_SETS:
            if (art_set, thing.slug) not in sprites:
                raise ValueError(f"{art_set} has no drawing of {thing.slug}")
    return sprites


def _is_complete(path: Path) -> bool:
    """Return True if the stored atlas has every object in every art set that holds all of them."""
    if not path.exists():
        return False
    with np.load(path) as stored:
        keys = set(stored.files)
    return all(f"{art_set}/{thing.slug}" in keys for art_set in REQUIRED_SETS for thing in _all_objects())


def load_atlas(work: Path) -> Atlas:
    """Load the atlas of all training and held-out objects, cached as one .npz in the work folder. The atlas is built
    again if the stored one lacks an object."""
    path = work / "atlas.npz"
    if not _is_complete(path):
        sprites = _build(work / "npm")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **{f"{art}/{slug}": np.asarray(image) for (art, slug), image in sprites.items()})
        temporary.rename(path)
    with np.load(path) as stored:
        images = {tuple(key.split("/")): Image.fromarray(stored[key]) for key in stored.files}
    return Atlas(sprites=images)  # type: ignore[arg-type]
