"""The three functions for scripts and notebooks, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import textual_inversion as ti
from tests.pipeline.runs import write_photo
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.families.base import Backbone
from textual_inversion.learning import learn
from textual_inversion.photo_files import read_photos

CONFIG = ti.InversionConfig(steps=4, batch_size=2)
SAMPLING = ti.SamplingConfig(steps=2, batch_size=2, guidance_scale=2.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(2):
        write_photo(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path / "photos"


def test_a_word_is_that_of_the_engine(tiny_backbone: Backbone, photos: Path) -> None:
    steps: list[tuple[int, float]] = []
    previews: dict[int, LearnedEmbedding] = {}
    word = ti.learn(
        tiny_backbone,
        photos,
        initializer="cat",
        placeholder="<mine>",
        config=CONFIG,
        on_step=lambda step, loss: steps.append((step, loss)),
        on_preview=previews.__setitem__,
        preview_steps=2,
    )
    concept = Concept(concept_id="<mine>", placeholder_token="<mine>", initializer="cat")
    (expected,) = learn(tiny_backbone, [(concept, read_photos(photos))], CONFIG, slots=1)
    assert torch.equal(word.vectors["clip_l"], expected.vectors["clip_l"])
    assert word.placeholder_token == "<mine>"
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert all(loss > 0 for _, loss in steps)
    assert [(step, preview.metadata["step"]) for step, preview in previews.items()] == [(2, "2")]
    assert not torch.equal(previews[2].vectors["clip_l"], word.vectors["clip_l"])


def test_pictures_and_paths_are_the_same_photos(tiny_backbone: Backbone, photos: Path) -> None:
    files = sorted(photos.glob("*.png"))
    opened = [Image.open(path) for path in files]
    words = [ti.learn(tiny_backbone, given, config=CONFIG) for given in (photos, str(photos), files, opened)]
    assert all(torch.equal(word.vectors["clip_l"], words[0].vectors["clip_l"]) for word in words[1:])


def test_drawing_puts_words_where_the_prompt_has_room(tiny_backbone: Backbone) -> None:
    first = ti.learn(tiny_backbone, [Image.new("RGB", (32, 32), "red")], placeholder="<a>", config=CONFIG)
    second = ti.learn(tiny_backbone, [Image.new("RGB", (32, 32), "blue")], placeholder="<b>", config=CONFIG)
    drawn = ti.draw(tiny_backbone, "a {} and a {}", first, second, count=2, seed=5, sampling=SAMPLING)
    written = ti.draw(tiny_backbone, "a <a> and a <b>", second, first, seed=6, sampling=SAMPLING)
    assert drawn[1].tobytes() == written[0].tobytes() != drawn[0].tobytes()
    assert len(ti.draw(tiny_backbone, "a cat", sampling=SAMPLING)) == 1
    with pytest.raises(ValueError, match=r"has 1 places \{\} for 2 words"):
        ti.draw(tiny_backbone, "a {}", first, second)
    with pytest.raises(ValueError, match="does not contain the placeholder token '<a>'"):
        ti.draw(tiny_backbone, "a cat", first)


def test_photos_that_are_none(tiny_backbone: Backbone, tmp_path: Path) -> None:
    for given, message in (
        (tmp_path, "has no photos, files that end with"),
        (tmp_path / "gone.png", r"gone\.png cannot be read: No such file"),
        ([], "no photos; give 3 to 5"),
        ([Image.new("RGBA", (32, 32))], "transparent pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            ti.learn(tiny_backbone, given)
    with pytest.raises(ValueError, match="2 captions for 1 photos"):
        ti.learn(tiny_backbone, [Image.new("RGB", (32, 32))], captions=("a {}", "the {}"))


def test_names_of_the_package() -> None:
    assert {*ti.__all__} <= {*dir(ti)}
    assert ti.Concept is Concept
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = ti.train
