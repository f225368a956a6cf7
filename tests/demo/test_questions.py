"""The questions of the evaluation: the right answer of each fits its prompt and its scene."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from demo.captions import TINTS
from demo.evaluate import halves, pair_accuracy
from demo.objects import TRAINING
from demo.questions import (
    Question,
    colour_questions,
    mean_entropy_bits,
    name_questions,
    pair_questions,
    place_questions,
    style_questions,
    view_questions,
)
from demo.views import VIEWS
from demo.world import MANY_COLOURED, STYLES


@pytest.mark.parametrize(
    "question",
    [
        name_questions(TRAINING[:30], 2),
        place_questions(TRAINING, 2),
        style_questions(TRAINING, 2),
        view_questions(TRAINING, 2),
    ],
)
def test_the_right_option_is_the_prompt(question: Question) -> None:
    for prompt, scene, options, answer in zip(
        question.prompts, question.scenes, question.options, question.answers, strict=True
    ):
        assert options[answer] == prompt
        assert len(set(options)) == len(options)
        assert scene.thing.name in prompt


def test_every_kind_is_asked_equally_often() -> None:
    styles = [scene.style for scene in style_questions(TRAINING, 3).scenes]
    assert {style: styles.count(style) for style in STYLES} == dict.fromkeys(STYLES, 3)
    views = [scene.views for scene in view_questions(TRAINING, 3).scenes]
    assert {view: views.count(view) for view in views} == dict.fromkeys([(), *((view,) for view in VIEWS)], 3)


def test_pairs_are_of_two_things_and_the_answer_is_left_to_right() -> None:
    things = TRAINING[:20]
    question = pair_questions(things, 60)
    assert (question.answers[:, 0] != question.answers[:, 1]).all()
    assert len({tuple(pair) for pair in question.answers}) == 60
    for prompt, scene, (left, right), is_ordered in zip(
        question.prompts, question.scenes, question.answers, question.is_ordered, strict=True
    ):
        assert (scene.thing, scene.second, scene.relation) == (things[left], things[right], "left")
        assert ("left" in prompt) == is_ordered
        assert things[left].name in prompt
        assert things[right].name in prompt


class _ByColour:
    """Classifier for which option i is the colour i of a list."""

    def choose(self, pictures: list[Image.Image], options: list[list[str]]) -> np.ndarray:
        assert len(pictures) == len(options)
        means = np.stack([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures])
        return means.argmax(1)


def test_both_objects_of_a_pair_have_to_be_named() -> None:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    question = pair_questions(TRAINING[:3], 6)

    def picture(left: int, right: int) -> Image.Image:
        drawn = Image.new("RGB", (64, 64), colours[left])
        drawn.paste(colours[right], (32, 0, 64, 64))
        return drawn

    right = [picture(*answer) for answer in question.answers]
    assert pair_accuracy(_ByColour(), right, question) == {"both_named": 1, "both_in_place": 1}  # type: ignore[arg-type]
    swapped = [picture(*answer[::-1]) for answer in question.answers]
    assert pair_accuracy(_ByColour(), swapped, question) == {"both_named": 1, "both_in_place": 0}  # type: ignore[arg-type]
    one = [picture(answer[0], answer[0]) for answer in question.answers]
    assert pair_accuracy(_ByColour(), one, question) == {"both_named": 0, "both_in_place": 0}  # type: ignore[arg-type]
    assert halves(right[0])[0].size == (64, 64)


def test_colours_are_asked_in_the_worlds_proportions() -> None:
    question = colour_questions(TRAINING, 100, seed=0)
    assert set(question.nouns) == MANY_COLOURED
    assert not any(tint in prompt for tint in TINTS for prompt in question.prompts)
    assert 0.27 < np.mean([bool(scene.tint) for scene in question.scenes]) < 0.33
    assert all(len(options) == len(TINTS) for options in question.options)


def test_entropy_is_averaged_over_groups() -> None:
    assert mean_entropy_bits([0, 1, 2, 3], ["a"] * 4) == pytest.approx(2)
    assert mean_entropy_bits([0, 0, 1, 1, 5, 5], list("aaaabb")) == pytest.approx(0.5)
