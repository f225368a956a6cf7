"""The world's words and scenes: deterministic, and free of what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from demo import captions
from demo.art import Atlas
from demo.backgrounds import draw_background
from demo.objects import HELD_OUT, TRAINING
from demo.world import STYLES, Scene, caption, draw, sample_scene


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """Coloured squares in place of the art, which the tests must not need."""
    sprites = {}
    for art_set in ("noto", "twemoji", "fluent", "openmoji"):
        for index, thing in enumerate(TRAINING):
            colour = (index % 256, 3 * index % 256, 7 * index % 256, 255)
            sprites[art_set, thing.slug] = Image.new("RGBA", (128, 100), colour)
    return Atlas(sprites=sprites)


def _captions(count: int) -> list[str]:
    texts = []
    for index in range(count):
        rng = np.random.default_rng((3, index))
        texts.append(caption(sample_scene(TRAINING, rng), rng))
    return texts


def test_same_seed_same_scene_caption_and_picture(atlas: Atlas) -> None:
    def make() -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng((1, 2))
        scene = sample_scene(TRAINING, rng)
        return scene, caption(scene, rng), draw(scene, atlas, rng).tobytes()

    assert make() == make()


def test_held_out_names_are_in_no_caption() -> None:
    padded = [f" {text} " for text in _captions(3000)]
    for held in HELD_OUT:
        assert not any(f" {held.object.name} " in text for text in padded), held


def test_held_out_and_training_objects_are_disjoint() -> None:
    assert not {held.object.slug for held in HELD_OUT} & {thing.slug for thing in TRAINING}
    assert len(HELD_OUT) >= 24
    assert len({held.concept_id for held in HELD_OUT}) == len(HELD_OUT)


def test_names_are_unique_and_initializers_are_known_words() -> None:
    names = [thing.name for thing in TRAINING]
    assert len(set(names)) == len(names) >= 200
    words = {word for name in names for word in name.split()}
    assert {held.initializer for held in HELD_OUT} <= words


def test_captions_say_what_the_scene_has() -> None:
    thing = TRAINING[0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(Scene(thing, background="snow", is_background_named=True, tint="red"), rng)
        assert thing.name in text
        assert "red" in text
        assert "in the snow" in text


def test_articles() -> None:
    assert captions.fill("a photo of a {}", "apple") == "a photo of an apple"
    assert captions.fill("a photo of the {}", "apple") == "a photo of the apple"
    assert captions.fill("a photo of a {}", "unicorn") == "a photo of a unicorn"


def test_neutral_templates_are_the_papers_27() -> None:
    assert len(set(captions.NEUTRAL_TEMPLATES)) == 27
    assert all(template.count("{}") == 1 for template in captions.NEUTRAL_TEMPLATES)


@pytest.mark.parametrize("background", captions.BACKGROUNDS)
def test_backgrounds_are_smooth_pictures(background: str) -> None:
    canvas = draw_background(background, 64, np.random.default_rng(0))
    assert canvas.shape == (64, 64, 3)
    assert canvas.min() >= 0
    assert canvas.max() <= 255


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws(style: str, atlas: Atlas) -> None:
    picture = draw(Scene(TRAINING[5], style=style, tint="blue"), atlas, np.random.default_rng(0))
    assert picture.size == (64, 64)
    assert picture.mode == "RGB"
