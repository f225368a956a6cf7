"""The concepts that the demo's encoder is trained on: taught objects in taught art sets alone, drawn the same alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from demo.art import ART_SETS, HELD_OUT_SETS, Atlas
from demo.encoder_concepts import draw_concept, is_held_out
from demo.encoder_training import split
from demo.objects import TRAINING
from textual_inversion.concept import Concept

NEAR = {thing.name: ["cat", "dog", "fox"] for thing in TRAINING}


class Watched(Atlas):
    """An atlas of squares that knows what was taken from it."""

    def sprite(self, art_set: str, slug: str) -> Image.Image:
        assert art_set not in HELD_OUT_SETS
        return super().sprite(art_set, slug)


@pytest.fixture
def atlas() -> Atlas:
    square = Image.fromarray(np.full((32, 32, 4), (200, 60, 20, 255), np.uint8))
    return Watched(sprites={(art_set, thing.slug): square for art_set in ART_SETS for thing in TRAINING})


def test_a_concept_depends_on_its_number_alone(atlas: Atlas) -> None:
    row, pictures = draw_concept(500, 1, atlas, NEAR)
    again, same_pictures = draw_concept(500, 1, atlas, NEAR)
    assert row == again
    assert [each.tobytes() for each in pictures] == [each.tobytes() for each in same_pictures]
    assert row != draw_concept(500, 2, atlas, NEAR)[0]


def test_rows_are_rows_of_a_manifest(atlas: Atlas) -> None:
    names = {thing.name for thing in TRAINING}
    for number in range(60):
        row, pictures = draw_concept(number, 1, atlas, NEAR)
        assert len(row["images"]) == len(row["captions"]) == len(pictures) == 6
        assert row["initializer"] in names
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        Concept(placeholder_token="<c>", **values)  # captions have a place for the concept


def test_objects_made_up_of_two_follow_those_as_they_are(atlas: Atlas) -> None:
    """A made-up object is drawn from two drawings, neither of which is one of a held-out object."""

    taken: set[str] = set()

    class Recorded(Watched):
        def sprite(self, art_set: str, slug: str) -> Image.Image:
            taken.add(slug)
            return super().sprite(art_set, slug)

    recorded = Recorded(sprites=atlas.sprites)
    held_out = {thing.slug for i, thing in enumerate(TRAINING) if is_held_out(i)}
    pairs = 0
    for number in range(12 * len(TRAINING), 12 * len(TRAINING) + 25):
        taken.clear()
        draw_concept(number, 1, recorded, NEAR)
        own = TRAINING[number % len(TRAINING)].slug
        assert own in taken
        assert not held_out & taken - {own}
        assert len(taken) == 1 or not is_held_out(number)
        pairs += len(taken) == 2
    assert pairs > 20  # rarely an object is mixed with itself
    taken.clear()
    draw_concept(1, 1, recorded, NEAR)
    assert taken == {TRAINING[1].slug}


def test_no_object_is_trained_on_and_held_out() -> None:
    numbers = list(range(3 * len(TRAINING)))
    trained, held_out = split(numbers)  # type: ignore[arg-type, type-var]
    objects = [{number % len(TRAINING) for number in part} for part in (trained, held_out)]
    assert not objects[0] & objects[1]
    assert len(objects[1]) == 24
    assert sorted(trained + held_out) == numbers
