"""Words of the demo world's captions: templates, styles, colours, places, sizes.

Neutral prompts are the 27 templates of Textual Inversion (Gal et al. 2022, appendix D) and always show the same plain
look, so that inversion's own prompts are inside the model's training distribution. Their adjectives ("clean", "small")
have no meaning here, on purpose; sizes are named "tiny" and "huge".
"""

from __future__ import annotations

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

SHORT_TEMPLATES = ("a {}", "the {}", "a picture of a {}", "a picture of the {}")
"""Further neutral templates, as people type them in a hurry."""

STYLE_TEMPLATES = {
    "sticker": ("a flat sticker of a {}", "a sticker of a {}", "a flat sticker of the {}"),
    "render": ("a 3d render of a {}", "a 3d render of the {}", "a glossy 3d render of a {}"),
    "sketch": ("a pencil sketch of a {}", "a pencil drawing of a {}", "a sketch of the {}"),
    "pixel": ("pixel art of a {}", "a pixel art of a {}", "pixel art of the {}"),
    "mono": ("a black and white photo of a {}", "a black and white photo of the {}"),
    "oil": ("an oil painting of a {}", "an oil painting of the {}"),
}
STYLE_NAMES = {
    "sticker": "a flat sticker",
    "render": "a 3d render",
    "sketch": "a pencil sketch",
    "pixel": "pixel art",
    "mono": "a black and white photo",
    "oil": "an oil painting",
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


def background_phrases(background: str) -> tuple[str, ...]:
    """Return the phrases for a background in captions: "on a red background", "in the snow"."""
    if background in COLOURS:
        return (f"on a {background} background",)
    return PLACE_PHRASES[background]


def fill(template: str, noun: str) -> str:
    """Put a noun phrase in the hole, with "an" where the sound asks for it."""
    if noun[:1] in "aeio" and noun != "unicorn":
        template = template.replace("a {}", "an {}")
    return template.replace("{}", noun, 1)
