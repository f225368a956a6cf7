"""Scenes of the demo world: their content, their captions and their pictures.

A `Scene` is plain data; `caption` and `draw` are functions of it and of a random generator, so the same seed gives the
same picture and the same words. Importing this module needs no art; drawing needs an `Atlas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageOps, ImageStat

from demo import captions
from demo.backgrounds import draw_background
from demo.filters import FILTERS, HELD_OUT_FILTERS
from demo.objects import UNTINTED, WorldObject
from demo.views import BORDER_VIEWS, COLOUR_VIEWS, GEOMETRY_VIEWS, MILD_VIEWS, OTHER_VIEWS, VIEWS, apply_views
from textual_inversion.prompts import TEXTBOOST_TEMPLATES

if TYPE_CHECKING:
    from demo.art import Atlas

_Option = TypeVar("_Option")
PICTURE_PX = 64
ART_SET_OF_STYLE = {"sticker": "twemoji", "render": "fluent", "icon": "fluent-flat"}
"""Styles that use another art set; all others use the Noto drawing, filtered or plain."""
STYLES = ("plain", *captions.STYLE_TEMPLATES)
_STYLE_WEIGHTS = {
    "plain": 0.39,
    "sticker": 0.09,
    "render": 0.09,
    "icon": 0.08,
    "sketch": 0.07,
    "pixel": 0.07,
    "mono": 0.03,
    "oil": 0.07,
    "watercolor": 0.035,
    "blueprint": 0.03,
    "neon": 0.025,
    "carving": 0.02,
}
"""Weights of the styles among scenes of one object in the ordinary view."""
_COLOURLESS_STYLES = frozenset({"sketch", "mono", "blueprint", "neon", "carving"})
"""Styles that keep neither the colour of a flat background nor a tint, so captions must not name them."""
MANY_COLOURED = frozenset(
    {"car", "balloon", "umbrella", "shirt", "dress", "handbag", "cap", "bicycle", "kite", "chair", "gift", "truck"}
)
"""Nouns whose colour varies without being said: most have the drawing's own colour, some any colour that has a word."""
UNSAID_TINT_SHARE = 0.3
_MANY_COLOURED_SHARE = 0.03
"""Share of scenes that are drawn of these nouns alone, so that each is seen often enough in each colour."""
_VIEW_SHARE, _MILD_VIEW_SHARE, _PAIR_SHARE = 0.12, 0.03, 0.14
_SECOND_VIEW_SHARE = 0.25
_AROUND_SHARE = 0.5
"""Share of captions whose views are named in front of the caption and behind it."""
_PLAIN_PAIR_SHARE = 0.7
_SIZE_RANGE = {"": (0.70, 0.84), "tiny": (0.38, 0.42), "huge": (1.00, 1.05)}
"""Range of the object's longer side as a fraction of the picture, by size word."""
_PAIR_SIZE_RANGE = (0.44, 0.50)
_SWAPPED_SHARE = 0.15
"""Share of pairs that are "beside" each other with the first object on the right."""
_SHIFT_PX = 1.5
_ROTATION_DEGREES = 3.0
"""Standard deviations of the pose. Nothing is mirrored unsaid."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Content of one picture."""

    thing: WorldObject
    style: str = "plain"
    """Style, one of `STYLES` or `HELD_OUT_FILTERS`."""
    background: str = "white"
    """Background, a key of `captions.COLOURS` or `captions.PLACE_PHRASES`."""
    is_background_named: bool = False
    """True if the caption names the background; unnamed ones are nearly always white."""
    tint: str = ""
    """Colour word of the object, or "" for its own colours."""
    is_tint_named: bool = True
    """True if the caption names the tint."""
    size: str = ""
    """Size word: "tiny", "huge", or "" for the default."""
    views: tuple[str, ...] = ()
    """Views, keys of `captions.VIEW_WORDS`, in the order in which they act. The caption names them."""
    is_mild: bool = False
    """True if the view is one that belongs to an adjective of the neutral templates."""
    second: WorldObject | None = None
    """Second object of a pair."""
    relation: str = ""
    """Relation of the first object to the second one, a key of `captions.RELATION_PHRASES`, or "" for one object."""
    noun: str = ""
    """Word that captions use in place of the object's name, or ""."""
    hue_degrees: float = 0.0
    """Rotation of the object's hues, which makes another instance of the same object."""

    @property
    def names(self) -> tuple[str, ...]:
        """Nouns of the objects, one or two."""
        first = self.noun or self.thing.name
        return (first, self.second.name) if self.second else (first,)

    @property
    def attributes(self) -> tuple[str, str, str, str, str, str]:
        """Properties that a caption of this scene can name besides the objects: style, background, tint, size, views,
        relation."""
        tint = self.tint if self.is_tint_named else ""
        return (self.style, self.background, tint, self.size, "+".join(self.views), self.relation)


def _pick(options: Sequence[_Option], rng: np.random.Generator) -> _Option:
    return options[rng.integers(len(options))]


def _is_colourless(style: str, views: Sequence[str]) -> bool:
    """Return True if the picture keeps neither the colour of a flat background nor a tint."""
    return style in _COLOURLESS_STYLES or "grayscale" in views


def _sample_background(rng: np.random.Generator, views: Sequence[str], *, is_colourless: bool) -> tuple[str, bool]:
    """Draw a background that fits the views, and whether the caption names it."""
    options = ("white", *captions.PLACE_PHRASES) if is_colourless else captions.BACKGROUNDS
    if BORDER_VIEWS & set(views):
        options = ("white",) if is_colourless else tuple(captions.COLOURS)
    is_named = bool(rng.random() < 0.5)
    background = _pick(options, rng) if is_named or rng.random() < 0.1 else "white"
    return background, is_named and not (is_colourless and background == "white")


def _sample_tint(thing: WorldObject, rng: np.random.Generator) -> tuple[str, bool]:
    """Draw a tint, mostly none, and whether the caption names it."""
    if rng.random() < 0.06 and thing.name not in UNTINTED:
        return _pick(tuple(captions.TINTS), rng), True
    if thing.name in MANY_COLOURED and rng.random() < UNSAID_TINT_SHARE:
        return _pick(tuple(captions.TINTS), rng), False
    return "", True


def _sample_views(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw one view, or two of different kinds, in the order of the paired augmentation."""
    groups = (tuple(GEOMETRY_VIEWS), tuple(COLOUR_VIEWS), tuple(OTHER_VIEWS))
    first = _pick(tuple(VIEWS), rng)
    chosen = [first]
    if rng.random() < _SECOND_VIEW_SHARE:
        chosen.append(_pick([view for group in groups if first not in group for view in group], rng))
    return tuple(view for view in VIEWS if view in chosen)


def sample_scene(things: Sequence[WorldObject], rng: np.random.Generator) -> Scene:
    """Draw a random scene of `things`."""
    kind = rng.random()
    coloured = [thing for thing in things if thing.name in MANY_COLOURED]
    thing = _pick(coloured if coloured and rng.random() < _MANY_COLOURED_SHARE else things, rng)
    second = None
    relation, views, is_mild = "", (), False
    if kind < _PAIR_SHARE:
        second = _pick([other for other in things if other != thing], rng)
        relation = _pick(("beside", "beside", "left", "right", "on"), rng)
    elif kind < _PAIR_SHARE + _VIEW_SHARE:
        views = _sample_views(rng)
    elif kind < _PAIR_SHARE + _VIEW_SHARE + _MILD_VIEW_SHARE:
        views, is_mild = (_pick(tuple(MILD_VIEWS), rng),), True
    style = "plain"
    if not views and not (second and rng.random() < _PLAIN_PAIR_SHARE):
        style = str(rng.choice(list(_STYLE_WEIGHTS), p=list(_STYLE_WEIGHTS.values())))
    is_colourless = _is_colourless(style, views)
    background, is_background_named = _sample_background(rng, views, is_colourless=is_colourless)
    tint, is_tint_named = ("", True) if is_colourless else _sample_tint(thing, rng)
    size = _pick(captions.SIZES, rng) if not views and second is None and rng.random() < 0.06 else ""
    return Scene(
        thing, style, background, is_background_named, tint, is_tint_named, size, views, is_mild, second, relation
    )


def sample_unnamed_scene(thing: WorldObject, noun: str, hue_degrees: float, rng: np.random.Generator) -> Scene:
    """Draw a random scene of one object whose captions say `noun`: mostly plain, some in a view or a filter style."""
    kind = rng.random()
    views = _sample_views(rng) if kind < 0.08 else ()
    style = _pick(tuple(FILTERS), rng) if kind > 0.85 else "plain"
    background, is_named = _sample_background(rng, views, is_colourless=_is_colourless(style, views))
    return Scene(thing, style, background, is_named, views=views, noun=noun, hue_degrees=hue_degrees)


def _noun_phrase(scene: Scene, template: str, rng: np.random.Generator) -> str:
    """Return the noun phrase of the scene's object or pair, to be put in the template."""
    tint = scene.tint if scene.is_tint_named else ""
    noun = " ".join(word for word in (scene.size, tint, scene.names[0]) if word)
    if scene.second is None:
        return noun
    article = "the" if "the {}" in template else "a"
    return captions.relation_phrase(
        _pick(captions.RELATION_PHRASES[scene.relation], rng), noun, scene.names[1], article
    )


def _fill(template: str, scene: Scene, rng: np.random.Generator) -> str:
    return captions.fill(template, _noun_phrase(scene, template, rng))


def _view_caption(scene: Scene, place: str, rng: np.random.Generator) -> str:
    """Return a caption that names the scene's views by words before the medium, around the caption, or by a phrase."""
    if scene.is_mild:
        return _fill(_pick(captions.MILD_VIEW_TEMPLATES[scene.views[0]], rng), scene, rng) + place
    template = _pick((*captions.VIEWLESS_TEMPLATES, *TEXTBOOST_TEMPLATES), rng)
    if template in TEXTBOOST_TEMPLATES or rng.random() < _AROUND_SHARE:
        words = {view: _pick(captions.VIEW_WORDS[view], rng) for view in scene.views}
        before = {view: words.pop(view) for view in scene.views if view == "grid" or rng.random() < 0.5}
        return captions.name_views_around(_fill(template, scene, rng) + place, before, words)
    views, phrase = list(scene.views), ""
    draw = rng.random()
    if views[-1] == "grid" and draw < 0.4:
        views, template = views[:-1], _pick(captions.GRID_TEMPLATES, rng)
    elif draw < 0.4 and (phrased := [view for view in views if view in captions.VIEW_PHRASES]):
        views.remove(phrased[-1])
        phrase = f" {_pick(captions.VIEW_PHRASES[phrased[-1]], rng)}"
    if views:
        template = captions.name_views(template, [_pick(captions.VIEW_WORDS[view], rng) for view in views])
    return _fill(template, scene, rng) + phrase + place


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Draw a caption of the scene. One of a styled scene may name the style alone, as style prompts do."""
    place = f" {_pick(captions.background_phrases(scene.background), rng)}" if scene.is_background_named else ""
    if scene.views:
        return _view_caption(scene, place, rng)
    draw = rng.random()
    if scene.style == "plain":
        templates = captions.SHORT_TEMPLATES if draw < 0.2 else captions.NEUTRAL_TEMPLATES
        return _fill(_pick(templates, rng), scene, rng) + place
    style_name = captions.STYLE_NAMES[scene.style]
    if draw < 0.08:
        return _pick(captions.STYLE_ONLY_TEMPLATES, rng).format(style=style_name) + place
    if draw < 0.25:
        template = _pick(captions.STYLE_SUFFIX_TEMPLATES, rng)
        filled = captions.fill(template, _noun_phrase(scene, template, rng) + place)
        return filled.replace("{style}", style_name)
    return _fill(_pick(captions.STYLE_TEMPLATES[scene.style], rng), scene, rng) + place


def _tinted(sprite: Image.Image, tint: str) -> Image.Image:
    """Return the cut-out in shades of one colour: the middle tone gets it, dark stays dark, white stays white."""
    grey, alpha = ImageOps.grayscale(sprite.convert("RGB")), sprite.getchannel("A")
    middle = int(np.clip(ImageStat.Stat(grey, alpha.point(lambda level: 255 * (level > 127))).median[0], 70, 200))
    shades = ImageOps.colorize(grey, "#141414", "#ffffff", captions.TINTS[tint], midpoint=middle)
    shades.putalpha(alpha)
    return shades


def _hue_rotated(sprite: Image.Image, degrees: float) -> Image.Image:
    """Return the cut-out with every hue rotated by the same angle."""
    hue, saturation, value = sprite.convert("RGB").convert("HSV").split()
    turn = round(degrees * 256 / 360)
    rotated = Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")
    rotated.putalpha(sprite.getchannel("A"))
    return rotated


def _posed(sprite: Image.Image, longer_side_px: float, rng: np.random.Generator) -> Image.Image:
    """Return the cut-out at the size, a little rotated."""
    scale = longer_side_px / max(sprite.size)
    sprite = sprite.rotate(rng.normal(0, _ROTATION_DEGREES), Image.Resampling.BICUBIC, expand=True)
    size = (max(4, round(sprite.width * scale)), max(4, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def _pair_centres(
    scene: Scene, first: Image.Image, second: Image.Image, px: int, rng: np.random.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the centres of a pair, (x, y) in pixels: side by side, or the first standing on the second."""
    if scene.relation == "on":
        overlap = 0.05 * px
        top = (px - first.height - second.height + overlap) / 2
        middle = top + first.height - overlap
        return (px / 2, top + first.height / 2), (px / 2, middle + second.height / 2)
    is_swapped = scene.relation == "right" or (scene.relation == "beside" and rng.random() < _SWAPPED_SHARE)
    left, right = (0.26 * px, px / 2), (0.74 * px, px / 2)
    return (right, left) if is_swapped else (left, right)


def _paste(
    picture: Image.Image, sprite: Image.Image, centre: tuple[float, float], shift_px: float, rng: np.random.Generator
) -> None:
    offset = rng.normal(0, shift_px, 2)
    box = (round(middle - side / 2 + shift) for middle, side, shift in zip(centre, sprite.size, offset, strict=True))
    picture.paste(sprite, tuple(box), sprite)


def draw(scene: Scene, atlas: Atlas, rng: np.random.Generator, px: int = PICTURE_PX, art_set: str = "") -> Image.Image:
    """Draw the scene as an RGB picture of px x px. `art_set` replaces the style's art set, for a held-out style."""
    source = art_set or ART_SET_OF_STYLE.get(scene.style, "noto")
    sprite = atlas.sprite(source, scene.thing.slug)
    if scene.hue_degrees:
        sprite = _hue_rotated(sprite, scene.hue_degrees)
    if scene.tint:
        sprite = _tinted(sprite, scene.tint)
    picture = Image.fromarray(draw_background(scene.background, px, rng).astype(np.uint8))
    shift_px = _SHIFT_PX * px / PICTURE_PX
    if scene.second is None:
        _paste(
            picture, _posed(sprite, rng.uniform(*_SIZE_RANGE[scene.size]) * px, rng), (px / 2, px / 2), shift_px, rng
        )
    else:
        other = atlas.sprite(source, scene.second.slug)
        first, second = (_posed(each, rng.uniform(*_PAIR_SIZE_RANGE) * px, rng) for each in (sprite, other))
        first_centre, second_centre = _pair_centres(scene, first, second, px, rng)
        _paste(picture, second, second_centre, shift_px / 2, rng)
        _paste(picture, first, first_centre, shift_px / 2, rng)
    filtered = {**FILTERS, **HELD_OUT_FILTERS}.get(scene.style, lambda unchanged: unchanged)(picture)
    return apply_views(filtered, scene.views, is_mild=scene.is_mild, rng=rng)
