"""The world's objects: taught and held out apart, under names that a caption can use."""

from __future__ import annotations

import re

from demo.objects import HELD_OUT, TRAINING, UNTINTED


def test_enough_is_taught_and_held_out() -> None:
    assert len(TRAINING) >= 420
    assert len(HELD_OUT) >= 45


def test_names_and_slugs_are_unique() -> None:
    things = [*TRAINING, *(held.object for held in HELD_OUT)]
    assert len({thing.name for thing in things}) == len(things)
    assert len({thing.slug for thing in things}) == len(things)


def test_no_taught_name_contains_a_held_out_name() -> None:
    for held in HELD_OUT:
        words = re.compile(rf"\b{held.object.name}\b")
        assert not [thing.name for thing in TRAINING if words.search(thing.name)], held


def test_initializers_are_single_taught_words() -> None:
    words = {word for thing in TRAINING for word in thing.name.split()}
    assert {held.initializer for held in HELD_OUT} <= words


def test_names_are_plain_words() -> None:
    for thing in (*TRAINING, *(held.object for held in HELD_OUT)):
        assert re.fullmatch(r"[a-z]+( [a-z]+){0,2}", thing.name), thing
        assert " and " not in f" {thing.name} ", "captions join the names of two objects with it"


def test_concept_ids_are_safe_in_paths() -> None:
    assert all(re.fullmatch(r"[a-z-]+", held.concept_id) for held in HELD_OUT)


def test_untinted_names_are_taught() -> None:
    assert {thing.name for thing in TRAINING} >= UNTINTED
