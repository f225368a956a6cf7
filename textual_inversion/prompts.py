"""Prompts: the paper's templates, and prompts as token ids with a concept's rows in the place of its placeholder.

A tokenized prompt is a mapping from text encoder key to ids; each text encoder has a vocabulary of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol
from unicodedata import normalize

from textual_inversion.concept import Category, Concept, whole_word_pattern
from textual_inversion.config import TemplateSet
from textual_inversion.errors import BadInput

HOLE = "{}"

_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")

AFTER_WITHOUT_COMMA = ("left", "right")
"""Names of the augmentation tokens that stand behind a prompt without a comma."""


class Vocabulary(Protocol):
    """One text encoder's tokenizer: texts -> ids of its vocabulary -> whole prompts."""

    @property
    def size(self) -> int:
        """Number of ids in the vocabulary; id `size + i` stands for row i of the rows in use."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id after a prompt's last word; the ids behind it are padding."""
        ...

    @property
    def unknown(self) -> int:
        """Id that stands for a part of a text that the tokenizer has no token for; it may be the end of the text."""
        ...

    @property
    def max_tokens(self) -> int:
        """Largest number of ids that `assemble` can take."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the vocabulary ids of a text, without start, end or padding."""
        ...

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add start, end and padding: ids of a fixed length. Raises BadInput if they do not fit."""
        ...


Vocabularies = Mapping[str, Vocabulary]
"""Text encoder key -> its vocabulary."""

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

# JMaiGC/textboost a806fda, training/dataset.py:65-76, the default of its `--template`.
TEXTBOOST_TEMPLATES = (
    "{} with background",
    "a {} with background",
    "the {} with background",
    "photo of a {} with background",
)

_TEMPLATES: Mapping[TemplateSet, Mapping[Category, tuple[str, ...]]] = {
    "textual_inversion": {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES},
    "textboost": {"object": TEXTBOOST_TEMPLATES, "style": STYLE_TEMPLATES},
}


def fill(template: str, word: str) -> str:
    """Put a word into the template's hole. Raises BadInput if there is none."""
    if HOLE not in template:
        raise BadInput(f"template {template!r} has no {HOLE} to put {word!r} in")
    return template.replace(HOLE, word)


def class_noun(concept: Concept, *, class_cue: bool) -> str:
    """Return the noun that follows a concept's rows in every prompt: with the class cue its initializer, a word or a
    phrase; empty without the cue, and for a concept without an initializer."""
    return concept.initializer if class_cue else ""


def name_in_prompt(word: str, noun: str) -> str:
    """Return the text that names a concept in a prompt, when it is learned and when it is drawn: "V*", or "V* cat".

    `word` stands for the concept's rows, however many: its placeholder token, or HOLE. `noun` is its `class_noun`.
    DreamBooth and TextBoost learn and draw "V* cat"; Textual Inversion learns and draws "V*".
    """
    return f"{word} {noun}" if noun else word


def without_placeholder(prompt: str, placeholder_token: str) -> str:
    """Remove the placeholder from a prompt, for CLIP-T ("A photo of on the moon", Gal et al. 2022, section 5).

    The prompt is given before a class noun is added to it, so that the text names the concept by no word, and CLIP-T
    compares concepts learned with and without the class cue by the same text. A noun that the prompt itself has stays:
    "a {} dog in the jungle" of DreamBench becomes "a dog in the jungle", the text of Ruiz et al. 2023 and of
    TextBoost's evaluation.
    """
    pieces = _split(prompt, [placeholder_token])
    return " ".join(" ".join(piece for piece in pieces if piece != placeholder_token).split())


def training_templates(
    concept: Concept, *, class_cue: bool, templates: TemplateSet = "textual_inversion"
) -> tuple[str, ...]:
    """Return the templates a concept is learned from: its captions, the i-th for the i-th photo, or the list of its
    category in the set `templates`, any for any photo. With the class cue, the class noun follows the hole."""
    texts = concept.captions or _TEMPLATES[templates][concept.category]
    return with_class_noun(texts, class_noun(concept, class_cue=class_cue))


def with_class_noun(templates: Sequence[str], noun: str) -> tuple[str, ...]:
    """Put a class noun behind the hole of each template; an empty one changes nothing."""
    return tuple(template.replace(HOLE, name_in_prompt(HOLE, noun)) for template in templates)


def augmentation_word(name: str) -> str:
    """Return the placeholder of an augmentation token (`paired_augment.TRANSFORM_SETS`). No user types it."""
    return f"<augmentation:{name}>"


def with_augmentation_words(template: str, before: Sequence[str], after: Sequence[str]) -> str:
    """Put augmentation tokens in front of a template (TextBoost's "A* photo of a {}") and behind it, where the code
    writes a comma before each but the two of a shift (`AFTER_WITHOUT_COMMA`)."""
    words = "".join(f"{augmentation_word(name)} " for name in before)
    ends = (f"{'' if name in AFTER_WITHOUT_COMMA else ','} {augmentation_word(name)}" for name in after)
    return f"{words}{template}{''.join(ends)}"


def token_ids(text: str, vocabulary: Vocabulary) -> list[int]:
    """Tokenize a text. Raises BadInput if the tokenizer has no token for a part of it.

    CLIP's tokenizer writes the token that ends a prompt for such a part, and the encoder would ignore all ids behind
    it; others have a token that says nothing. The same tokens can be written out in the text.
    """
    ids = vocabulary.tokenize(text)
    if not {vocabulary.end_of_text, vocabulary.unknown}.isdisjoint(ids):
        raise BadInput(f"the model's tokenizer has no token for something in {text.strip()!r}; leave it out")
    return ids


def check_placeholder(concept: Concept, vocabularies: Vocabularies) -> None:
    """Raise BadInput, with a proposal, for a placeholder token that is one word of a vocabulary and has no angle
    brackets.

    Prompts here would lose that word, web UIs replace it in every prompt, and diffusers refuses to load the file.
    """
    token = concept.placeholder_token
    proposal = f"<{token.strip('<>')}>"
    for vocabulary in vocabularies.values():
        ids = vocabulary.tokenize(token)
        if len(ids) == 1 and ids != [vocabulary.unknown] and token != proposal:
            raise BadInput(
                f"placeholder {token!r} is a word of the model's own vocabulary, which prompts would lose, and under "
                f"which diffusers refuses to load a file; take one that is none, such as {proposal!r}"
            )


def initializer_ids(initializer: str, vocabularies: Vocabularies) -> dict[str, list[int]]:
    """Return a concept's initializer as ids, text encoder key -> ids; no ids without an initializer.

    Raises BadInput if a tokenizer has no token for it.
    """
    found = {}
    for key, vocabulary in vocabularies.items():
        try:
            ids = token_ids(initializer, vocabulary)
        except BadInput as error:
            raise BadInput(f"initializer: {error}") from error
        if initializer and not ids:
            raise BadInput(
                f"initializer {initializer!r} is nothing to the model's tokenizer; give a plain word, or none"
            )
        found[key] = ids
    return found


def encode_prompt(
    prompt: str, placeholders: Mapping[str, Sequence[int]], vocabularies: Vocabularies
) -> dict[str, list[int]]:
    """Encode a prompt as ids, text encoder key -> ids of that encoder's length.

    `placeholders`: placeholder word -> numbers of its rows; row i becomes id `size + i` of each vocabulary. A
    placeholder counts only as a whole word: `cat` is not touched inside `catalog` or `<cat>`, and where two could
    match (`<cat>`, `<cat>s`) the longer wins. Raises BadInput, naming the prompt, if it does not fit a text encoder
    or holds a text that a tokenizer has no token for.
    """
    pieces = _split(prompt, placeholders)
    encoded = {}
    for key, vocabulary in vocabularies.items():
        ids: list[int] = []
        try:
            for piece in pieces:
                rows = placeholders.get(piece)
                ids += token_ids(piece, vocabulary) if rows is None else [vocabulary.size + row for row in rows]
            encoded[key] = vocabulary.assemble(ids)
        except BadInput as error:
            encoder = f", text encoder {key!r}" if len(vocabularies) > 1 else ""
            raise BadInput(f"prompt {prompt!r}{encoder}: {error}") from error
    return encoded


def encode_cut(prompt: str, vocabularies: Vocabularies) -> dict[str, list[int]]:
    """Encode a prompt without placeholders; one that is too long for a text encoder is cut, as its tokenizer would."""
    return {key: each.assemble(each.tokenize(prompt)[: each.max_tokens]) for key, each in vocabularies.items()}


def weight_in(prompt: str) -> str:
    """Return the first part of a prompt that other tools read as a weight, such as "(red:1.2)"; empty if there is none.
    Here it is plain text."""
    found = _WEIGHT.search(prompt)
    return found[0] if found else ""


def words_in(prompt: str, words: Collection[str]) -> list[str]:
    """Return those of the words that `encode_prompt` would find in the prompt as placeholders, in its order."""
    known = set(words)
    return list(dict.fromkeys(piece for piece in _split(prompt, words) if piece in known))


def placeholder_rows(concept: Concept) -> dict[str, range]:
    """Return `HOLE` -> the numbers of the concept's rows, for templates that the concept is to stand in."""
    return {HOLE: range(concept.num_vectors)}


def check_sample_prompts(
    vocabularies: Vocabularies, concept: Concept, templates: Sequence[str], *, class_cue: bool = False
) -> None:
    """Check that templates fit the model with this concept or its initializer in them, before it is learned.

    Raises BadInput for the first one that does not.
    """
    drawn = with_class_noun(templates, class_noun(concept, class_cue=class_cue))
    for template, prompt in zip(templates, drawn, strict=True):
        encode_prompt(prompt, placeholder_rows(concept), vocabularies)
        if not words_in(template, [HOLE]):
            raise BadInput(f"prompt {template!r} does not have {HOLE} as a word of its own")
        if concept.initializer:
            encode_prompt(fill(template, concept.initializer), {}, vocabularies)


def _split(prompt: str, words: Collection[str]) -> list[str]:
    """Cut the prompt before and after each of the words; blank pieces are dropped.

    A letter with an accent may be one character or two (Unicode's forms NFC and NFD, which look alike): the prompt and
    the words are compared in NFC, and each word is returned as it was given.
    """
    if not words:
        return [prompt] if prompt.strip() else []
    as_given = {normalize("NFC", word): word for word in words}
    longest_first = sorted(as_given, key=len, reverse=True)
    pieces = re.split(whole_word_pattern(*longest_first), normalize("NFC", prompt))
    return [as_given.get(piece, piece) for piece in pieces if piece.strip()]
