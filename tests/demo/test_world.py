"""The world's words and scenes: deterministic, true to each other, and free of what is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from demo import captions
from demo.art import REQUIRED_SETS, Atlas
from demo.backgrounds import draw_background
from demo.filters import HELD_OUT_FILTERS
from demo.objects import HELD_OUT, TRAINING
from demo.views import BORDER_VIEWS, MILD_VIEWS, VIEWS
from demo.world import ART_SET_OF_STYLE, MANY_COLOURED, STYLES, Scene, caption, draw, sample_scene
from textual_inversion.paired_augment import TRANSFORM_SETS
from textual_inversion.prompts import (
    OBJECT_TEMPLATES,
    TEXTBOOST_TEMPLATES,
    augmentation_word,
    with_augmentation_words,
)

BY_NAME = {thing.name: thing for thing in TRAINING}
FIRST, SECOND = TRAINING[0], TRAINING[1]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """Coloured shapes in place of the art, which the tests must not need."""
    sprites = {}
    for art_set in ("noto", *ART_SET_OF_STYLE.values(), "openmoji"):
        for index, thing in enumerate(TRAINING):
            sprite = Image.new("RGBA", (128, 100), (40 + index % 200, 3 * index % 256, 7 * index % 256, 255))
            sprite.paste((250, 250, 250, 255), (0, 0, 40, 30))  # a corner, so that no mirror image is the same
            sprites[art_set, thing.slug] = sprite
    sprites["noto", FIRST.slug] = Image.new("RGBA", (128, 128), (255, 0, 0, 255))
    sprites["noto", SECOND.slug] = Image.new("RGBA", (128, 128), (0, 0, 255, 255))
    return Atlas(sprites=sprites)


def _scenes(count: int) -> list[tuple[Scene, str]]:
    found = []
    for index in range(count):
        rng = np.random.default_rng((3, index))
        scene = sample_scene(TRAINING, rng)
        found.append((scene, caption(scene, rng)))
    return found


def _pixels(scene: Scene, atlas: Atlas, seed: int = 0) -> np.ndarray:
    return np.asarray(draw(scene, atlas, np.random.default_rng(seed)), np.float32)


def test_same_seed_same_scene_caption_and_picture(atlas: Atlas) -> None:
    def make(seed: int) -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng((1, seed))
        scene = sample_scene(TRAINING, rng)
        return scene, caption(scene, rng), draw(scene, atlas, rng).tobytes()

    for seed in range(40):
        assert make(seed) == make(seed)


def test_held_out_names_are_in_no_caption() -> None:
    padded = [f" {text} " for _, text in _scenes(3000)]
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
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(Scene(FIRST, background="snow", is_background_named=True, tint="red"), rng)
        assert FIRST.name in text
        assert "red" in text
        assert "in the snow" in text


def test_captions_of_fresh_scenes_are_true_of_them() -> None:
    for scene, text in _scenes(4000):
        if all(name in text for name in scene.names):  # else the style alone is named
            assert all(word in text for word in (scene.size, scene.tint if scene.is_tint_named else "")), text
            if scene.relation == "left":
                assert text.index(scene.names[0]) < text.index("left"), text
        else:
            assert captions.STYLE_NAMES[scene.style] in text
        assert (scene.style in ART_SET_OF_STYLE) + bool(scene.views) <= 1
        assert "{" not in text
        if scene.is_background_named:
            assert any(phrase in text for phrase in captions.background_phrases(scene.background)), text


def test_shares_of_what_a_scene_can_have() -> None:
    scenes = [scene for scene, _ in _scenes(6000)]
    views = np.mean([bool(scene.views) and not scene.is_mild for scene in scenes])
    pairs = np.mean([scene.second is not None for scene in scenes])
    assert 0.10 < views < 0.14
    assert 0.12 < pairs < 0.16
    assert {style for scene in scenes for style in [scene.style]} == set(STYLES)
    assert {view for scene in scenes for view in scene.views} == set(VIEWS)
    flat = [scene.background in captions.COLOURS for scene in scenes if BORDER_VIEWS & set(scene.views)]
    assert all(flat)


def test_some_nouns_have_an_unsaid_colour_with_a_skewed_prior() -> None:
    (things, others) = (
        [each for each in TRAINING if (each.name in MANY_COLOURED) == chosen] for chosen in (True, False)
    )
    assert len(things) == len(MANY_COLOURED)
    unsaid = [scene for scene in _plain_scenes(things, 2000) if not scene.tint or not scene.is_tint_named]
    tints = [scene.tint for scene in unsaid]
    assert 0.25 < np.mean([bool(tint) for tint in tints]) < 0.35
    assert set(tints) == {"", *captions.TINTS}
    assert all(scene.is_tint_named for scene in _plain_scenes(others, 500))
    for scene in unsaid[:200]:
        assert scene.tint == "" or f"{scene.tint} {scene.thing.name}" not in caption(scene, np.random.default_rng(0))


def _plain_scenes(things: list, count: int) -> list[Scene]:
    drawn = [sample_scene(things, np.random.default_rng((5, index))) for index in range(count)]
    return [scene for scene in drawn if scene.style == "plain" and "grayscale" not in scene.views]


def test_captions_name_only_art_sets_that_hold_every_object() -> None:
    assert {*ART_SET_OF_STYLE.values(), "noto"} == set(REQUIRED_SETS)


def test_articles() -> None:
    assert captions.fill("a photo of a {}", "apple") == "a photo of an apple"
    assert captions.fill("a photo of the {}", "apple") == "a photo of the apple"
    assert captions.fill("a photo of a {}", "unicorn") == "a photo of a unicorn"
    assert captions.fill("a photo of a {}", "umbrella") == "a photo of an umbrella"
    assert captions.fill("a photo of a {}", "hourglass") == "a photo of an hourglass"
    assert captions.relation_phrase("{} next to {article} {}", "cat", "owl", "a") == "cat next to an owl"
    assert captions.relation_phrase("{} next to {article} {}", "cat", "owl", "the") == "cat next to the owl"


def test_neutral_templates_are_the_papers_27() -> None:
    assert captions.NEUTRAL_TEMPLATES == OBJECT_TEMPLATES
    assert len(set(captions.NEUTRAL_TEMPLATES)) == 27
    assert all(template.count("{}") == 1 for template in captions.NEUTRAL_TEMPLATES)


def test_every_view_is_named_by_the_words_of_textboosts_tokens_before_the_medium() -> None:
    tokens = TRANSFORM_SETS["release"].tokens
    assert captions.VIEW_WORDS.keys() == VIEWS.keys() == tokens.keys()
    for view, start in tokens.items():
        assert captions.VIEW_WORDS[view][0] == start
        for template in captions.VIEWLESS_TEMPLATES:
            (medium,) = (word for word in template.split() if word in ("photo", "rendering", "rendition"))
            before, _, after = template.partition(medium)
            named = f"{before}flip {start} {medium}{after}"
            assert captions.name_views(template, ["flip", start]) == named
    assert captions.name_views("the photo of a {}", ["dark"]) == "the dark photo of a {}"
    assert captions.name_views("a rendition of a {}", ["upside down"]) == "an upside down rendition of a {}"


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_named_around_a_caption_where_textboost_puts_its_tokens(view: str) -> None:
    words = captions.VIEW_WORDS[view][0]
    for template in (*OBJECT_TEMPLATES, *TEXTBOOST_TEMPLATES):
        for before, after in (([view], []), ([], [view])):
            learned = with_augmentation_words(template, before, after).replace(augmentation_word(view), words)
            around = [dict.fromkeys(views, words) for views in (before, after)]
            assert captions.name_views_around(template, *around) == learned


def test_mild_views_belong_to_neutral_templates() -> None:
    assert captions.MILD_VIEW_TEMPLATES.keys() == MILD_VIEWS.keys()
    listed = [template for templates in captions.MILD_VIEW_TEMPLATES.values() for template in templates]
    assert sorted([*listed, *captions.VIEWLESS_TEMPLATES]) == sorted(captions.NEUTRAL_TEMPLATES)
    scene = Scene(FIRST, views=("dimmed",), is_mild=True)
    assert caption(scene, np.random.default_rng(0)) == f"a dark photo of the {FIRST.name}"


@pytest.mark.parametrize("background", captions.BACKGROUNDS)
def test_backgrounds_are_smooth_pictures(background: str) -> None:
    canvas = draw_background(background, 64, np.random.default_rng(0))
    assert canvas.shape == (64, 64, 3)
    assert canvas.min() >= 0
    assert canvas.max() <= 255


@pytest.mark.parametrize("style", [*STYLES, *HELD_OUT_FILTERS])
@pytest.mark.parametrize("px", [64, 96])
def test_every_style_draws(style: str, px: int, atlas: Atlas) -> None:
    picture = draw(Scene(TRAINING[5], style=style, tint="blue"), atlas, np.random.default_rng(0), px)
    assert picture.size == (px, px)
    assert picture.mode == "RGB"


def test_styles_look_different(atlas: Atlas) -> None:
    scene = Scene(TRAINING[5], background="grass")
    filters = [style for style in (*STYLES, *HELD_OUT_FILTERS) if style not in ART_SET_OF_STYLE]
    looks = [_pixels(replace(scene, style=style), atlas) for style in filters]
    for index, look in enumerate(looks):
        assert all(np.abs(look - other).mean() > 3 for other in looks[:index]), filters[index]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_changes_the_picture(view: str, atlas: Atlas) -> None:
    scene = Scene(TRAINING[5], background="blue")
    plain, seen = _pixels(scene, atlas), _pixels(replace(scene, views=(view,)), atlas)
    assert np.abs(plain - seen).mean() > 4
    if view == "hflip":
        assert (seen == plain[:, ::-1]).all()
    if view == "grayscale":
        assert (seen == np.asarray(ImageOps.grayscale(Image.fromarray(plain.astype(np.uint8))))[..., None]).all()


def test_a_pair_stands_as_its_caption_says(atlas: Atlas) -> None:
    def centres(relation: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        picture = _pixels(Scene(FIRST, second=SECOND, relation=relation), atlas, seed)
        red, blue = picture[..., 0] - picture[..., 2] > 128, picture[..., 2] - picture[..., 0] > 128
        return np.argwhere(red).mean(0), np.argwhere(blue).mean(0)

    is_left = []
    for seed in range(40):
        first, second = centres("left", seed)
        assert second[1] - first[1] > 20
        first, second = centres("right", seed)
        assert first[1] - second[1] > 20
        first, second = centres("on", seed)
        assert second[0] - first[0] > 20
        first, second = centres("beside", seed)
        is_left.append(first[1] < second[1])
    assert 0.7 < np.mean(is_left) < 1


def test_an_unnamed_instance_has_its_own_word_and_hue(atlas: Atlas) -> None:
    scene = Scene(FIRST, noun="blorp", hue_degrees=120)
    assert caption(scene, np.random.default_rng(0)).endswith("blorp")
    red, green, blue = _pixels(scene, atlas)[32, 32]
    assert green > 200 > 60 > max(red, blue)


def test_a_noun_phrase_is_filled_in_once() -> None:
    assert captions.fill("a painting of a {} in oil", "owl") == "a painting of an owl in oil"
    assert captions.fill("my {}", "owl") == "my owl"
    assert captions.fill("a painting of a {} in oil", "{} in the snow") == "a painting of a {} in the snow in oil"
