"""Words of the demo world's captions: templates, styles, views, relations, colours, places, sizes.

Neutral prompts are the 27 templates of Textual Inversion (Gal et al. 2022, appendix D) and show the plain look, so that
inversion's own prompts are inside the model's training distribution. Adjectives of quality ("clean", "small") have no
meaning here; sizes are named "tiny" and "huge". Adjectives that name a view ("cropped", "close-up", "bright", "dark")
stand with such a view, mostly a mild one, in a third to a half of their captions and with the plain picture otherwise.
The photos of a concept that is learned with these templates do not follow them, and a word that always changed the
picture would teach the concept's row to undo the change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from textual_inversion.prompts import AFTER_WITHOUT_COMMA, TEXTBOOST_TEMPLATES

# fmt: skip below: a list of short texts reads better in a block than on a line each
NEUTRAL_TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip

SHORT_TEMPLATES = ("a {}", "the {}", "a picture of a {}", "a picture of the {}", *TEXTBOOST_TEMPLATES)
"""Further neutral templates: as people type them in a hurry, and those that TextBoost learns with."""

STYLE_TEMPLATES = {
    "sticker": ("a flat sticker of a {}", "a sticker of a {}", "a flat sticker of the {}"),
    "render": ("a 3d render of a {}", "a 3d render of the {}", "a glossy 3d render of a {}"),
    "icon": ("a vector icon of a {}", "a vector icon of the {}", "an icon of a {}"),
    "sketch": ("a pencil sketch of a {}", "a pencil drawing of a {}", "a sketch of the {}"),
    "pixel": ("pixel art of a {}", "a pixel art of a {}", "pixel art of the {}"),
    "mono": ("a black and white photo of a {}", "a black and white photo of the {}"),
    "oil": ("an oil painting of a {}", "an oil painting of the {}"),
    "watercolor": ("a watercolor of a {}", "a watercolor painting of a {}", "a watercolor of the {}"),
    "blueprint": ("a blueprint of a {}", "a blueprint of the {}", "a blueprint drawing of a {}"),
    "neon": ("a neon sign of a {}", "a neon sign of the {}", "a glowing neon sign of a {}"),
    "carving": ("a stone carving of a {}", "a stone carving of the {}", "a carving of a {}"),
}
STYLE_NAMES = {
    "sticker": "a flat sticker",
    "render": "a 3d render",
    "icon": "a vector icon",
    "sketch": "a pencil sketch",
    "pixel": "pixel art",
    "mono": "a black and white photo",
    "oil": "an oil painting",
    "watercolor": "a watercolor",
    "blueprint": "a blueprint",
    "neon": "a neon sign",
    "carving": "a stone carving",
}
STYLE_SUFFIX_TEMPLATES = (
    "a picture of a {} in the style of {style}",
    "a picture of the {} in the style of {style}",
    "a painting of a {} in the style of {style}",
)

# fmt: skip below: a list of words reads better in a block than on a line each
_STYLE_ONLY_ADJECTIVES = (
    "cropped", "clean", "dirty", "dark", "cool", "close-up", "bright", "good", "nice", "small", "weird", "large",
)  # fmt: skip
STYLE_ONLY_TEMPLATES = (
    "a painting in the style of {style}",
    "a rendering in the style of {style}",
    "the painting in the style of {style}",
    "a picture in the style of {style}",
    "a rendition in the style of {style}",
    *(f"a {adjective} painting in the style of {{style}}" for adjective in _STYLE_ONLY_ADJECTIVES),
)
"""Textual Inversion's style templates, which name no object."""

VIEW_WORDS = {
    "zoom-in": ("zoom in", "zoomed in", "close-up"),
    "zoom-out": ("far away", "zoomed out", "distant"),
    "crop": ("crop", "cropped"),
    "left": ("on the left",),
    "right": ("on the right",),
    "hflip": ("flip", "flipped", "mirrored"),
    "vflip": ("flip", "upside down"),
    "grayscale": ("gray", "grayscale"),
    "bright": ("bright", "very bright"),
    "dimmed": ("dark", "dim"),
    "cutout": ("hole",),
    "grid": ("grid of",),
}
"""Views, and the words that name them before the word for the medium ("a gray photo of a cat"). The first are those
that the rows of TextBoost's augmentation tokens start from (`paired_augment.TRANSFORM_SETS`, set `release`)."""
VIEW_PHRASES = {
    "zoom-out": ("far away", "in the distance"),
    "left": ("on the left",),
    "right": ("on the right",),
    "hflip": ("in a mirror",),
    "vflip": ("upside down",),
    "cutout": ("with a hole",),
}
"""Phrases that name a view after the object."""
GRID_TEMPLATES = ("a grid of photos of a {}", "a grid of photos of the {}", "a grid of pictures of a {}")
MILD_VIEW_TEMPLATES = {
    view: tuple(template for template in NEUTRAL_TEMPLATES if f" {adjective} " in template)
    for view, adjective in {"zoom-in": "close-up", "crop": "cropped", "bright": "bright", "dimmed": "dark"}.items()
}
"""Neutral templates whose adjective names a view."""
VIEWLESS_TEMPLATES = tuple(
    template for template in NEUTRAL_TEMPLATES if not any(template in each for each in MILD_VIEW_TEMPLATES.values())
)

RELATION_PHRASES = {
    "beside": ("{} and {article} {}", "{} next to {article} {}"),
    "left": ("{} to the left of {article} {}", "{} on the left and {article} {} on the right"),
    "right": ("{} to the right of {article} {}", "{} on the right and {article} {} on the left"),
    "on": ("{} on top of {article} {}", "{} on {article} {}"),
}
"""Relation of the first object to the second one, and the noun phrases that say it."""

COLOURS = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "red": (205, 45, 45),
    "blue": (50, 90, 210),
    "green": (50, 155, 70),
    "yellow": (245, 215, 75),
    "purple": (125, 65, 165),
    "pink": (246, 165, 195),
}
TINTS = {
    "red": (215, 40, 40),
    "blue": (45, 95, 225),
    "green": (50, 165, 65),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 180),
    "pink": (240, 120, 170),
}
"""Colour words of tinted objects, and the RGB of their middle tone."""

PLACE_PHRASES = {
    "beach": ("on the beach",),
    "snow": ("in the snow",),
    "grass": ("on the grass", "in a grassy field"),
    "night": ("at night", "under the stars"),
    "brick": ("in front of a brick wall", "on a brick wall"),
    "wood": ("on a wooden table",),
    "water": ("under water",),
    "moon": ("on the moon",),
}
BACKGROUNDS = (*COLOURS, *PLACE_PHRASES)
SIZES = ("tiny", "huge")

_CONSONANT_SOUNDS = ("uni", "uku", "eu", "ewe", "one")
"""Beginnings that are written with a vowel and spoken with a consonant."""


def background_phrases(background: str) -> tuple[str, ...]:
    """Return the phrases for a background in captions: "on a red background", "in the snow"."""
    if background in COLOURS:
        return (f"on a {background} background",)
    return PLACE_PHRASES[background]


def name_views(template: str, words: Sequence[str]) -> str:
    """Put the words of views before the template's word for the medium: "a flip dark photo of a {}"."""
    named = re.sub(r"\b(photo|rendering|rendition)\b", rf"{' '.join(words)} \1", template, count=1)
    return named if named.startswith("the ") else with_article(named.partition(" ")[2])


def name_views_around(text: str, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Put the words of views in front of a whole caption and behind it, where the code of TextBoost puts its
    augmentation tokens: "flip a photo of a {}", "a photo of a {}, dark". The mappings go from view to words."""
    ends = (f"{'' if view in AFTER_WITHOUT_COMMA else ','} {words}" for view, words in after.items())
    return " ".join((*before.values(), text)) + "".join(ends)


def relation_phrase(phrase: str, first: str, second: str, article: str) -> str:
    """Return two nouns in a phrase of `RELATION_PHRASES`; the article of the second is "the" or "a"."""
    if article == "a":
        article, _, second = with_article(second).partition(" ")
    return phrase.format(first, second, article=article)


def with_article(noun: str) -> str:
    """Return the noun phrase with "a" or "an", by its sound."""
    is_vowel = noun.startswith("hourglass") or (noun[:1] in set("aeiou") and not noun.startswith(_CONSONANT_SOUNDS))
    return f"{'an' if is_vowel else 'a'} {noun}"


def fill(template: str, noun: str) -> str:
    """Put a noun phrase, which may have a hole itself, in the hole, with "an" where the sound asks for it."""
    hole, filling = ("a {}", with_article(noun)) if "a {}" in template else ("{}", noun)
    return template.replace(hole, filling, 1)
