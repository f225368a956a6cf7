"""Prompts: the paper's templates, and a prompt as token ids with a concept's rows where its placeholder stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from textual_inversion.concept import Category, Concept, whole_word_pattern
from textual_inversion.errors import BadInput

HOLE = "{}"


UNUSED_ID = 2**30
"""In no vocabulary; where only the number of a concept's rows matters, their ids begin here."""


class Vocabulary(Protocol):
    """What a prompt needs of a model: every `Backbone` is one, and so is a `tokenizer.Tokenizer` alone."""

    @property
    def end_of_text(self) -> int: ...

    def tokenize(self, text: str) -> list[int]: ...

    def assemble(self, ids: Sequence[int]) -> list[int]: ...


# Gal et al. 2022, appendix D: the paper's 27. (Its repository later tripled the list; the paper prints each with a
# full stop, its code has none.)
OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

# rinongal/textual_inversion, personalized_style.py: 19, of which two ("cropped", "close-up") are there twice.
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

_TEMPLATES: Mapping[Category, tuple[str, ...]] = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


def fill(template: str, word: str) -> str:
    """The template with its hole taken by a word."""
    if HOLE not in template:
        raise BadInput(f"template {template!r} has no {HOLE} to put {word!r} in")
    return template.replace(HOLE, word)


def without_placeholder(prompt: str, placeholder_token: str) -> str:
    """The prompt that CLIP-T compares with: the word removed ("A photo of on the moon", Gal et al. 2022, section 5)."""
    return " ".join(re.sub(whole_word_pattern(placeholder_token), " ", prompt).split())


def training_templates(concept: Concept, *, class_cue: bool) -> tuple[str, ...]:
    """The templates a concept is learned from: its captions, the i-th for the i-th photo, or the list of its category,
    any for any photo. With the class cue, its initializer word follows the hole."""
    templates = concept.captions or _TEMPLATES[concept.category]
    if class_cue and concept.initializer:
        return tuple(fill(template, f"{HOLE} {concept.initializer}") for template in templates)
    return templates


def augmentation_word(name: str) -> str:
    """What stands in a prompt for the augmentation token of this name (`paired.AUGMENTATION_TOKENS`), to be given its
    row by `encode_prompt`. No user types it."""
    return f"<augmentation:{name}>"


def augmented(template: str, augmentation: Sequence[str]) -> str:
    """TextBoost's "a A* photo of a {}": the augmentation tokens before the word for the medium, or in front of a
    template (a caption, say) that has none."""
    if not augmentation:
        return template
    words = " ".join(augmentation_word(name) for name in augmentation)
    medium = re.search(r"\b(photo|rendering|rendition|painting|picture)\b(?=.*\{\})", template)
    place = medium.start() if medium else 0
    return f"{template[:place]}{words} {template[place:]}"


def tokens_of(text: str, vocabulary: Vocabulary) -> list[int]:
    """The text's ids. Raises BadInput if the tokenizer has none for a part of it: it puts the token there that ends a
    prompt, and nothing behind that would be read. The same token can be written out."""
    ids = vocabulary.tokenize(text)
    if vocabulary.end_of_text in ids:
        raise BadInput(f"the model's tokenizer has no token for something in {text.strip()!r}; leave it out")
    return ids


def initializer_ids(initializer: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a concept's initializer, none for none. Raises BadInput if it is nothing to the tokenizer."""
    try:
        ids = tokens_of(initializer, vocabulary)
    except BadInput as error:
        raise BadInput(f"initializer: {error}") from error
    if initializer and not ids:
        raise BadInput(f"initializer {initializer!r} is nothing to the model's tokenizer; give a plain word, or none")
    return ids


def encode_prompt(prompt: str, placeholders: Mapping[str, Sequence[int]], backbone: Vocabulary) -> list[int]:
    """A prompt as `max_length` ids, each placeholder word replaced by its row ids.

    A placeholder counts only as a whole word: `cat` is not touched inside `catalog` or `<cat>`, and where two could
    match (`<cat>`, `<cat>s`) the longer wins. Raises BadInput, naming the prompt, if it does not fit or holds what
    the tokenizer does not know.
    """
    ids: list[int] = []
    try:
        for piece in _split(prompt, placeholders):
            ids += placeholders[piece] if piece in placeholders else tokens_of(piece, backbone)
        return backbone.assemble(ids)
    except BadInput as error:
        raise BadInput(f"prompt {prompt!r}: {error}") from error


def standing_in(concept: Concept) -> dict[str, range]:
    """`HOLE` -> as many ids as the concept has rows, to see whether prompts fit before there are any."""
    return {HOLE: range(UNUSED_ID, UNUSED_ID + concept.num_vectors)}


def check_sample_prompts(vocabulary: Vocabulary, concept: Concept, templates: Sequence[str]) -> None:
    """Raises BadInput if a template will not fit the model with this concept or its initializer in it: better known
    before the concept is learned."""
    for template in templates:
        if UNUSED_ID not in encode_prompt(template, standing_in(concept), vocabulary):
            raise BadInput(f"prompt {template!r} does not have {HOLE} as a word of its own")
        if concept.initializer:
            encode_prompt(fill(template, concept.initializer), {}, vocabulary)


def _split(prompt: str, words: Mapping[str, Sequence[int]]) -> list[str]:
    """The prompt cut before and after each of the words; blank pieces are dropped."""
    if not words:
        return [prompt] if prompt.strip() else []
    longest_first = sorted(words, key=len, reverse=True)
    pieces = re.split(whole_word_pattern(*longest_first), prompt)
    return [piece for piece in pieces if piece.strip()]
