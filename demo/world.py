"""Scenes of the demo world: their content, their captions and their pictures.

A `Scene` is plain data; `caption` and `draw` are functions of it and of a random generator, so the same seed gives the
same picture and the same words. Importing this module needs no art; drawing needs an `Atlas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from demo import captions
from demo.backgrounds import draw_background
from demo.objects import UNTINTED, WorldObject

if TYPE_CHECKING:
    from demo.art import Atlas

PICTURE_PX = 64
ART_SET_OF_STYLE = {"sticker": "twemoji", "render": "fluent"}
"""Styles that use another art set; all others use the Noto drawing, filtered or plain."""
STYLES = ("plain", *captions.STYLE_TEMPLATES)
_STYLE_WEIGHTS = {
    "plain": 0.44,
    "sticker": 0.12,
    "render": 0.10,
    "sketch": 0.08,
    "pixel": 0.08,
    "mono": 0.06,
    "oil": 0.12,
}
"""Weights of the styles in sampling, higher where a style differs by fine detail, which is learned last."""
_SIZE_RANGE = {"": (0.76, 0.82), "tiny": (0.40, 0.42), "huge": (1.00, 1.04)}
"""Range of the object's longer side as a fraction of the picture, by size word."""
_SHIFT_PX = 0.8
_ROTATION_DEGREES = 1.5
"""Standard deviations of the pose, small: with 2.2 px, 4 degrees and mirroring, 750 steps gave shapeless blobs."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Content of one picture."""

    thing: WorldObject
    style: str = "plain"
    """Style, one of `STYLES`."""
    background: str = "white"
    """Background, a key of `captions.COLOURS` or `captions.PLACE_PHRASES`."""
    is_background_named: bool = False
    """True if the caption names the background; unnamed ones are nearly always white."""
    tint: str = ""
    """Colour word, or "" for the object's own colours."""
    size: str = ""
    """Size word: "tiny", "huge", or "" for the default."""

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Properties that a caption of this scene can name besides the object."""
        return (self.style, self.background, self.tint, self.size)


def sample_scene(things: Sequence[WorldObject], rng: np.random.Generator) -> Scene:
    """Draw a random scene with one of `things`."""
    thing = things[rng.integers(len(things))]
    style = STYLES[rng.choice(len(STYLES), p=[_STYLE_WEIGHTS[name] for name in STYLES])]
    is_named = bool(rng.random() < 0.5)
    if is_named or rng.random() < 0.1:
        background = captions.BACKGROUNDS[rng.integers(len(captions.BACKGROUNDS))]
    else:
        background = "white"
    tint = size = ""
    if style != "mono" and rng.random() < 0.07 and thing.name not in UNTINTED:
        tint = tuple(captions.TINTS)[rng.integers(len(captions.TINTS))]
    if rng.random() < 0.06:
        size = captions.SIZES[rng.integers(2)]
    return Scene(thing, style, background, is_named, tint, size)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Draw a caption of the scene. One of a styled scene may name the style alone, as style prompts do."""
    noun = " ".join(word for word in (scene.size, scene.tint, scene.thing.name) if word)
    style_name = captions.STYLE_NAMES.get(scene.style, "")
    place = f" {_pick(captions.background_phrases(scene.background), rng)}" if scene.is_background_named else ""
    draw = rng.random()
    if scene.style == "plain":
        templates = captions.SHORT_TEMPLATES if draw < 0.15 else captions.NEUTRAL_TEMPLATES
        return captions.fill(_pick(templates, rng), noun) + place
    if draw < 0.08:
        return _pick(captions.STYLE_ONLY_TEMPLATES, rng).format(style=style_name) + place
    if draw < 0.25:
        filled = captions.fill(_pick(captions.STYLE_SUFFIX_TEMPLATES, rng), noun + place)
        return filled.replace("{style}", style_name)
    return captions.fill(_pick(captions.STYLE_TEMPLATES[scene.style], rng), noun) + place


def _tinted(sprite: Image.Image, tint: str) -> Image.Image:
    """Return the cut-out in shades of one colour: dark stays dark, white stays white."""
    shades = ImageOps.colorize(ImageOps.grayscale(sprite.convert("RGB")), "#141414", "#ffffff", captions.TINTS[tint])
    shades.putalpha(sprite.getchannel("A"))
    return shades


def _filtered(picture: Image.Image, style: str) -> Image.Image:
    """Apply a style that is a filter over the whole picture; other styles change nothing."""
    px = picture.width
    if style == "mono":
        return ImageOps.grayscale(picture).convert("RGB")
    if style == "oil":
        smooth = picture.filter(ImageFilter.MedianFilter(5 * px // 64 | 1))
        return smooth.point(lambda value: min(255, max(0, round(1.2 * value - 16))))
    if style == "pixel":
        return picture.resize((16, 16), Image.Resampling.BOX).resize((px, px), Image.Resampling.NEAREST)
    if style == "sketch":
        grey = np.asarray(ImageOps.grayscale(picture), np.float32)
        soft = np.asarray(ImageOps.grayscale(picture).filter(ImageFilter.GaussianBlur(2.5 * px / 64)), np.float32)
        dodged = np.clip(255 * (grey + 12) / (soft + 12), 0, 255)  # lines where the picture is darker than its surround
        darkened = 255 * (dodged / 255) ** 1.6
        return Image.fromarray(np.clip(darkened, 0, 255).astype(np.uint8)).convert("RGB")
    return picture


def draw(scene: Scene, atlas: Atlas, rng: np.random.Generator, px: int = PICTURE_PX, art_set: str = "") -> Image.Image:
    """Draw the scene as an RGB picture of px x px. `art_set` replaces the style's art set, for the held-out style."""
    sprite = atlas.sprite(art_set or ART_SET_OF_STYLE.get(scene.style, "noto"), scene.thing.slug)
    if scene.tint:
        sprite = _tinted(sprite, scene.tint)
    target_px = rng.uniform(*_SIZE_RANGE[scene.size]) * px
    scale = target_px / max(sprite.size)
    sprite = sprite.rotate(rng.normal(0, _ROTATION_DEGREES), Image.Resampling.BICUBIC, expand=True)
    size = (max(4, round(sprite.width * scale)), max(4, round(sprite.height * scale)))
    sprite = sprite.resize(size, Image.Resampling.LANCZOS)
    offset = rng.normal(0, _SHIFT_PX * px / PICTURE_PX, 2)
    left, top = (round((px - side) / 2 + shift) for side, shift in zip(size, offset, strict=True))
    picture = Image.fromarray(draw_background(scene.background, px, rng).astype(np.uint8))
    picture.paste(sprite, (left, top), sprite)
    return _filtered(picture, scene.style)
