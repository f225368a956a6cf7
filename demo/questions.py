"""Questions about pictures of known objects: prompts, scenes, captions to choose from and the right ones.

The same question is put to the world's own pictures of the scenes and to the model's pictures of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo import captions
from demo.objects import WorldObject
from demo.views import VIEWS
from demo.world import MANY_COLOURED, STYLES, UNSAID_TINT_SHARE, Scene

_PLAIN = "a photo of a {}"
_VIEW_QUESTION_WORDS = {view: words[min(1, len(words) - 1)] for view, words in captions.VIEW_WORDS.items()}
"""Words that name each view in questions: where a view has several, not TextBoost's "flip", which names two views."""


@dataclass(frozen=True, slots=True)
class Question:
    """Pictures to make (prompts for the model, scenes for the world) with the captions to choose from and the right
    ones."""

    prompts: list[str]
    scenes: list[Scene]
    options: list[list[str]]
    answers: np.ndarray
    """Index of the right option of every picture."""


def name_options(things: Sequence[WorldObject]) -> list[str]:
    """Return one neutral caption for each name."""
    return [captions.fill(_PLAIN, thing.name) for thing in things]


def place_options(thing: WorldObject) -> list[str]:
    """Return captions of the same object in every place."""
    return [f"{captions.fill(_PLAIN, thing.name)} {phrases[0]}" for phrases in captions.PLACE_PHRASES.values()]


def style_options(thing: WorldObject) -> list[str]:
    """Return captions of the same object in every style, the plain look first."""
    templates = [_PLAIN, *(options[0] for options in captions.STYLE_TEMPLATES.values())]
    return [captions.fill(template, thing.name) for template in templates]


def view_options(thing: WorldObject) -> list[str]:
    """Return captions of the same object in every view, the ordinary view first."""
    named = [captions.name_views(_PLAIN, [_VIEW_QUESTION_WORDS[view]]) for view in VIEWS]
    return [captions.fill(template, thing.name) for template in (_PLAIN, *named)]


def name_questions(things: Sequence[WorldObject], repeats: int) -> Question:
    """Make questions about the name."""
    question = name_options(things)
    indices = np.tile(np.arange(len(things)), repeats)
    return Question(
        prompts=[question[index] for index in indices],
        scenes=[Scene(things[index]) for index in indices],
        options=[question] * len(indices),
        answers=indices,
    )


def _attribute_questions(
    things: Sequence[WorldObject],
    per_kind: int,
    options_of: Callable[[WorldObject], list[str]],
    kinds: Sequence[Mapping[str, Any]],
) -> Question:
    """Make questions about one attribute, with the name given.

    `options_of`: captions of an object, one for each kind. `kinds`: the fields of `Scene` that make each kind.
    """
    answers, asked = _spread(things, len(kinds), per_kind)
    return Question(
        prompts=[options_of(thing)[kind] for kind, thing in zip(answers, asked, strict=True)],
        scenes=[Scene(thing, **kinds[kind]) for kind, thing in zip(answers, asked, strict=True)],
        options=[options_of(thing) for thing in asked],
        answers=answers,
    )


def place_questions(things: Sequence[WorldObject], per_place: int) -> Question:
    """Make questions about the place, with the name given."""
    kinds = [{"background": place} for place in captions.PLACE_PHRASES]
    return _attribute_questions(things, per_place, place_options, kinds)


def style_questions(things: Sequence[WorldObject], per_style: int) -> Question:
    """Make questions about the style, with the name given."""
    return _attribute_questions(things, per_style, style_options, [{"style": style} for style in STYLES])


def view_questions(things: Sequence[WorldObject], per_view: int) -> Question:
    """Make questions about the view, with the name given."""
    kinds: list[dict[str, Any]] = [{"views": ()}, *({"views": (view,)} for view in VIEWS)]
    return _attribute_questions(things, per_view, view_options, kinds)


@dataclass(frozen=True, slots=True)
class PairQuestion:
    """Pictures of two objects side by side, each to be named among the same names on its own half of the picture."""

    prompts: list[str]
    scenes: list[Scene]
    options: list[str]
    answers: np.ndarray
    """Indices of the left and the right object's option, (picture, 2)."""
    is_ordered: np.ndarray
    """True for prompts that say which object is on the left, (picture,)."""


def pair_questions(things: Sequence[WorldObject], count: int) -> PairQuestion:
    """Make questions about both objects of a pair, each thing on the left in one of them and on the right in another.

    Every second prompt says the places ("a X on the left and a Y on the right"), the others do not ("a X and a Y").
    """
    answers = np.asarray([(i % len(things), (i + 1 + i // len(things)) % len(things)) for i in range(count)])
    prompts, scenes = [], []
    for index, (left, right) in enumerate(answers):
        phrase = captions.RELATION_PHRASES["left"][1] if index % 2 else captions.RELATION_PHRASES["beside"][0]
        noun = captions.relation_phrase(phrase, things[left].name, things[right].name, "a")
        prompts.append(captions.fill(_PLAIN, noun))
        scenes.append(Scene(things[left], second=things[right], relation="left"))
    return PairQuestion(prompts, scenes, name_options(things), answers, is_ordered=np.arange(count) % 2 == 1)


@dataclass(frozen=True, slots=True)
class ColourQuestion:
    """Pictures of nouns whose colour varies unsaid, each to be assigned to the nearest colour word."""

    prompts: list[str]
    scenes: list[Scene]
    options: list[list[str]]
    nouns: list[str]


def colour_questions(things: Sequence[WorldObject], repeats: int, seed: int) -> ColourQuestion:
    """Make questions about the colour of every noun that comes in many, in the world's own proportions."""
    rng = np.random.default_rng(seed)
    asked = [thing for thing in things if thing.name in MANY_COLOURED for _ in range(repeats)]
    colours = tuple(captions.TINTS)
    tints = [colours[rng.integers(len(colours))] if rng.random() < UNSAID_TINT_SHARE else "" for _ in asked]
    return ColourQuestion(
        prompts=[captions.fill(_PLAIN, thing.name) for thing in asked],
        scenes=[Scene(thing, tint=tint, is_tint_named=False) for thing, tint in zip(asked, tints, strict=True)],
        options=[[captions.fill(_PLAIN, f"{colour} {thing.name}") for colour in colours] for thing in asked],
        nouns=[thing.name for thing in asked],
    )


def mean_entropy_bits(answers: Sequence[int] | np.ndarray, groups: Sequence[str]) -> float:
    """Return the entropy in bits of the answers within each group, averaged over groups."""
    entropies = []
    for group in sorted(set(groups)):
        within = np.asarray(answers)[[each == group for each in groups]]
        shares = np.bincount(within)[np.bincount(within) > 0] / len(within)
        entropies.append(float(-(shares * np.log2(shares)).sum()))
    return float(np.mean(entropies))


def _spread(things: Sequence[WorldObject], kinds: int, per_kind: int) -> tuple[np.ndarray, list[WorldObject]]:
    """Return the kind and the thing of every picture: each kind equally often, things in turn."""
    count = kinds * per_kind
    return np.arange(count) % kinds, [things[index % len(things)] for index in range(count)]
