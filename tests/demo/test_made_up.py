"""Made-up objects: cut-outs of two drawings, the same from the same generator, and unlike both."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo import made_up
from demo.art import Sprite

RED, BLUE = (200, 30, 20, 255), (20, 40, 200, 255)


def disc(colour: tuple[int, int, int, int], width: int = 40, height: int = 32) -> Sprite:
    sprite = Image.new("RGBA", (width, height))
    ImageDraw.Draw(sprite).ellipse((0, 0, width - 1, height - 1), fill=colour)
    return sprite


def visible_colours(sprite: Sprite) -> set[tuple[int, ...]]:
    pixels = np.asarray(sprite)
    return {tuple(map(int, colour)) for colour in pixels[pixels[..., 3] > 127][:, :3]}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_made_up_object_is_a_visible_cut_out() -> None:
    for seed in range(60):
        made = made_up.make_up(disc(RED), disc(BLUE, 20, 50), np.random.default_rng(seed))
        assert made.mode == "RGBA"
        assert min(made.size) >= 4
        assert (np.asarray(made)[..., 3] > 127).mean() > 0.2
        again = made_up.make_up(disc(RED), disc(BLUE, 20, 50), np.random.default_rng(seed))
        assert made.tobytes() == again.tobytes()


def test_recoloured_has_the_shape_of_one_and_the_colours_of_the_other(rng: np.random.Generator) -> None:
    made = made_up._recoloured(disc(RED), disc(BLUE, 20, 50), rng)
    assert np.array_equal(np.asarray(made)[..., 3], np.asarray(disc(RED))[..., 3])
    assert visible_colours(made) == {BLUE[:3]}


def test_recoloured_keeps_light_and_dark(rng: np.random.Generator) -> None:
    sprite = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)).convert("RGBA")
    made = np.asarray(made_up._recoloured(sprite, sprite.rotate(90), rng).convert("L"), np.int64)
    assert np.abs(made - np.asarray(sprite.convert("L"), np.int64)).max() <= 4


def test_an_invisible_cut_out_gives_no_colours(rng: np.random.Generator) -> None:
    assert made_up._recoloured(disc(RED), Image.new("RGBA", (9, 9)), rng).tobytes() == disc(RED).tobytes()


def test_joined_is_the_one_above_and_the_other_below(rng: np.random.Generator) -> None:
    made = np.asarray(made_up._joined(disc(RED), disc(BLUE, 20, 50), rng))
    middle = made[:, made.shape[1] // 2]
    assert tuple(middle[2]) == RED
    assert tuple(middle[-3]) == BLUE


def test_a_part_shows_on_the_first(rng: np.random.Generator) -> None:
    made = made_up._with_part(disc(RED), disc(BLUE), rng)
    assert made.size == disc(RED).size
    assert {RED[:3], BLUE[:3]} <= visible_colours(made)
