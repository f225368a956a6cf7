from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Literal
from unicodedata import normalize

import pytest

from tests.toy_backbone import END, MAX_LENGTH, START, VOCAB_SIZE, VOCABULARY
from textual_inversion.concept import Category, Concept
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.prompts import (
    HOLE,
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    check_placeholder,
    check_sample_prompts,
    class_noun,
    encode_prompt,
    fill,
    initializer_ids,
    name_in_prompt,
    training_templates,
    weight_in,
    with_augmentation_words,
    with_class_noun,
    without_placeholder,
    words_in,
)

TOY = {"toy": VOCABULARY}
A, B = [1, 2], [3]


def encode(prompt: str, placeholders: dict[str, list[int]]) -> list[int | str]:
    """Without start and padding; the number of a row as text."""
    ids = encode_prompt(prompt, placeholders, TOY)["toy"]
    assert len(ids) == MAX_LENGTH
    assert ids[0] == START
    return [token if token < VOCAB_SIZE else f"{token - VOCAB_SIZE}" for token in ids[1 : ids.index(END)]]


def words(text: str) -> list[int]:
    return VOCABULARY.tokenize(text)


def numbers(rows: list[int]) -> list[str]:
    return [f"{row}" for row in rows]


def test_the_papers_lists() -> None:
    assert len(OBJECT_TEMPLATES) == len(set(OBJECT_TEMPLATES)) == 27
    assert len(STYLE_TEMPLATES) == 19
    assert len(set(STYLE_TEMPLATES)) == 17  # two entries repeat in the authors' file
    assert all(template.count(HOLE) == 1 and not template.endswith(".") for template in OBJECT_TEMPLATES)
    assert all(template.endswith("in the style of {}") for template in STYLE_TEMPLATES)


def test_fill() -> None:
    assert fill("a photo of a {}", "cat") == "a photo of a cat"
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        fill("a photo", "cat")


@pytest.mark.parametrize(
    ("prompt", "word", "text"),
    [
        ("A photo of <cat> on the moon", "<cat>", "A photo of on the moon"),  # the paper's own example
        ("a cat in a catalog", "cat", "a in a catalog"),
        ("<cat>", "<cat>", ""),
        ("<cat> and <cat2>", "<cat>", "and <cat2>"),
    ],
)
def test_the_placeholder_is_removed_from_the_text(prompt: str, word: str, text: str) -> None:
    assert without_placeholder(prompt, word) == text


def test_a_placeholder_becomes_its_rows() -> None:
    ids = encode("a photo of <cat> on <b>", {"<cat>": A, "<b>": B})
    assert ids == [*words("a photo of"), *numbers(A), *words("on"), *numbers(B)]


@pytest.mark.parametrize(
    "prompt", ["a catalog", "my <cat> here", "concat", "cat_s", "<cat", "scat cat2", "a photo", "", "  "]
)
def test_part_of_a_word_is_never_touched(prompt: str) -> None:
    assert encode(prompt, {"cat": A}) == words(prompt)
    assert not words_in(prompt, ["cat"])


@pytest.mark.parametrize("prompt", ["cat", "cat, asleep", "(cat)", "cat's", "a cat.", "big-cat"])
def test_punctuation_ends_a_word(prompt: str) -> None:
    before, after = prompt.split("cat")
    assert encode(prompt, {"cat": A}) == [*words(before), *numbers(A), *words(after)]
    assert words_in(prompt, ["cat", "dog"]) == ["cat"]


def test_the_longest_placeholder_wins() -> None:
    placeholders = {"*": [1], "<cat>": [2], "<cat>*": [3], "S*": [4], "cat": [5]}
    assert encode("<cat>* S* <cat> * cat", placeholders) == ["3", "4", "2", "1", "5"]
    assert words_in("<cat>* S*", placeholders) == ["<cat>*", "S*"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_may_be_a_character_of_its_own(form: Literal["NFC", "NFD"]) -> None:
    """As file names of macOS have it, where a keyboard types one character for both."""
    given = {normalize(form, "<café>"): A}
    for prompt in ("my <café> here", normalize("NFD", "my <café> here")):
        assert encode(prompt, given) == [*words("my "), *numbers(A), *words(" here")]
        assert words_in(prompt, given) == [*given]
        assert without_placeholder(prompt, *given) == "my here"


def test_neighbouring_placeholders() -> None:
    assert encode("<a><b>", {"<a>": A, "<b>": B}) == numbers([*A, *B])


def test_too_long_names_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"prompt 'so long.*do not fit"):
        encode_prompt("so long " * 20, {}, TOY)


@pytest.mark.parametrize(("category", "templates"), [("object", OBJECT_TEMPLATES), ("style", STYLE_TEMPLATES)])
def test_training_templates(category: Category, templates: tuple[str, ...]) -> None:
    concept = Concept(
        concept_id="a", placeholder_token="<a>", images=("x",), category=category, initializer="stuffed toy"
    )
    assert training_templates(concept, class_cue=False) == templates
    assert training_templates(concept, class_cue=True)[0] == f"{templates[0]} stuffed toy"


def test_no_class_cue_without_an_initializer() -> None:
    concept = Concept(concept_id="a", placeholder_token="<a>", images=("x",))
    assert training_templates(concept, class_cue=True) == OBJECT_TEMPLATES
    assert class_noun(concept, class_cue=True) == ""
    assert name_in_prompt("<a>", "") == "<a>"


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_a_concept_is_drawn_by_the_name_it_was_learned_by(num_vectors: int) -> None:
    """Filled with the same rows, a template of learning and a prompt of drawing are the same ids."""
    concept = Concept(
        concept_id="a", placeholder_token="<a>", images=("x",), initializer="stuffed toy", num_vectors=num_vectors
    )
    rows = range(num_vectors)
    for class_cue, name in ((True, "<a> stuffed toy"), (False, "<a>")):
        noun = class_noun(concept, class_cue=class_cue)
        assert name_in_prompt(concept.placeholder_token, noun) == name
        learned = [encode(each, {HOLE: rows}) for each in training_templates(concept, class_cue=class_cue)]
        assert [encode(fill(each, name), {"<a>": rows}) for each in OBJECT_TEMPLATES] == learned
        assert [encode(each, {HOLE: rows}) for each in with_class_noun(OBJECT_TEMPLATES, noun)] == learned


def test_captions_take_the_place_of_templates() -> None:
    captions = ("a {} on a red sofa", "{} asleep")
    concept = Concept(concept_id="a", placeholder_token="<a>", images=("x", "y"), captions=captions, initializer="cat")
    assert training_templates(concept, class_cue=False) == captions
    assert training_templates(concept, class_cue=True) == ("a {} cat on a red sofa", "{} cat asleep")


@pytest.mark.parametrize(
    ("before", "after", "prompt"),
    [
        (("crop", "dimmed"), (), "<augmentation:crop> <augmentation:dimmed> photo of a {}"),
        ((), ("crop", "dimmed"), "photo of a {}, <augmentation:crop>, <augmentation:dimmed>"),
        (("grid",), ("left",), "<augmentation:grid> photo of a {} <augmentation:left>"),
        ((), (), "photo of a {}"),
    ],
)
def test_augmentation_tokens_stand_in_front_of_a_prompt_and_behind_it(
    before: tuple[str, ...], after: tuple[str, ...], prompt: str
) -> None:
    """As in a806fda, paired_augmentation.py: a shift's tokens follow without a comma (lines 106-113)."""
    assert with_augmentation_words("photo of a {}", before, after) == prompt


def test_the_textboost_templates_are_its_releases() -> None:
    concept = Concept(concept_id="a", placeholder_token="<a>", images=("x",), initializer="cat")
    cued = training_templates(concept, class_cue=True, templates="textboost")
    assert cued == (
        "{} cat with background",
        "a {} cat with background",
        "the {} cat with background",
        "photo of a {} cat with background",
    )
    style = dataclasses.replace(concept, category="style")
    assert training_templates(style, class_cue=False, templates="textboost") == STYLE_TEMPLATES


def test_an_initializer_must_be_something_to_the_tokenizer(tiny_backbone: Backbone) -> None:
    vocabularies = tiny_backbone.vocabularies
    assert initializer_ids("", vocabularies) == {"clip_l": []}
    assert initializer_ids("cat", vocabularies) == {"clip_l": vocabularies["clip_l"].tokenize("cat")}
    with pytest.raises(ValueError, match=r"initializer: the model's tokenizer has no token for something in '<\|end"):
        initializer_ids("<|endoftext|>", vocabularies)
    with pytest.raises(ValueError, match=r"initializer ' ' is nothing to the model's tokenizer; give a plain word"):
        initializer_ids(" ", vocabularies)


def test_a_prompt_that_ends_itself_is_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"prompt 'a <\|endoftext\|> cat': .* no token for something"):
        encode_prompt("a <|endoftext|> cat", {}, tiny_backbone.vocabularies)


def test_sample_prompts_are_tried_with_the_rows_and_the_initializer(tiny_backbone: Backbone) -> None:
    concept = Concept(concept_id="c", placeholder_token="photo", images=("a",), initializer="cat", num_vectors=4)
    check_sample_prompts(tiny_backbone.vocabularies, concept, ["a photo of a {}"])
    for template, message in (
        ("a photo of {}s", "as a word of its own"),
        ("a {} " + "on the " * 9, "more than the 22"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sample_prompts(tiny_backbone.vocabularies, concept, [template])


def test_sample_prompts_are_tried_with_the_class_noun(tiny_backbone: Backbone) -> None:
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("a",), initializer="cat", num_vectors=20)
    check_sample_prompts(tiny_backbone.vocabularies, concept, ["a {}"])
    check_sample_prompts(tiny_backbone.vocabularies, concept, ["{}"], class_cue=True)
    with pytest.raises(ValueError, match=r"prompt 'a very {} cat'.*more than the 22"):
        check_sample_prompts(tiny_backbone.vocabularies, concept, ["a very {}"], class_cue=True)


@pytest.mark.parametrize(("token", "refused"), [("cat", True), ("<cat>", False), ("catty", False), ("cat>", False)])
def test_a_word_of_the_vocabulary_is_no_placeholder(tiny_backbone: Backbone, token: str, refused: bool) -> None:
    """'cat>' is no word either: the tokenizer cuts it in two."""
    concept = Concept(concept_id="c", placeholder_token=token, images=("a",))
    with pytest.raises(BadInput, match=r"'cat' is a word .* such as '<cat>'") if refused else nullcontext():
        check_placeholder(concept, tiny_backbone.vocabularies)


def test_weights_of_other_tools_are_found() -> None:
    assert weight_in("a (red:1.2) {}") == "(red:1.2)"
    assert weight_in("a {} (in the snow: .5 )") == "(in the snow: .5 )"
    assert [weight_in(text) for text in ("a {} (at 10:30 or so)", "a {} (a: b)", "a {}:1.2", "a {} (1.2)")] == [""] * 4
