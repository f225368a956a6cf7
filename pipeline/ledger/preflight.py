"""Checks of good rows before a run: texts that do not fit the model, photos that do not open.

Needs the tokenizer and the pictures alone: no torch, no Ray, no GPU. A run refuses the same concepts with the same
functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.inputs.photos import open_pictures
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.plan import ConceptTask
from pipeline.store.redact import redact
from textual_inversion.concept import Concept
from textual_inversion.prompts import (
    HOLE,
    UNUSED_ID,
    Vocabulary,
    check_sample_prompts,
    encode_prompt,
    fill,
    initializer_ids,
    standing_in,
    training_templates,
)

if TYPE_CHECKING:
    from textual_inversion.tokenizer import Tokenizer

_THREADS = 4
"""Threads that open photos; each may hold one concept's decoded photos."""
_BATCH = 64
_TOKENS_PER_WORD = 3
"""Largest number of tokens of an initializer's word that is likely to be known to the model; a word of more tokens is
spelled out in pieces without a meaning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of one concept, or a remark about it."""

    concept_id: str
    text: str
    is_fatal: bool
    """The concept, or pictures of it, would fail; otherwise the finding is a remark."""

    def __str__(self) -> str:
        return f"{'would fail' if self.is_fatal else 'note'}: {self.concept_id}: {self.text}"


def examine(
    tasks: Iterable[ConceptTask], config: RunConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, photos: bool
) -> Iterator[Finding]:
    """Yield the findings of the concepts that are to be learned, in their order.

    `photos`: also fetch and open every photo and mask.
    """
    vocabulary = _CachedTokenizer(tokenizer)
    rest = iter(tasks)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="preflight") as pool:
        while batch := [task.concept for task in islice(rest, _BATCH)]:
            opened = pool.map(lambda concept: photo_problem(concept, config), batch) if photos else [""] * len(batch)
            for concept, problem in zip(batch, opened, strict=True):
                yield from text_findings(concept, config, prompts, vocabulary)
                if problem:
                    yield Finding(concept.concept_id, problem, is_fatal=True)


def photo_problem(concept: Concept, config: RunConfig) -> str:
    """Return the error of opening the concept's photos and masks; empty if all of them can be used."""
    try:
        open_pictures(concept, config.photos)
    except (ValueError, OSError) as error:
        return redact(str(error))
    return ""


def text_findings(
    concept: Concept, config: RunConfig, prompts: Sequence[Prompt], vocabulary: Vocabulary
) -> Iterator[Finding]:
    """Yield the findings of the initializer and of the training, sample and bulk prompts under the model's tokenizer.

    The augmentation words that TextBoost adds to a prompt, photo by photo, are not counted.
    """
    try:
        _check_training(concept, config, vocabulary)
        check_sample_prompts(vocabulary, concept, config.grid.prompts_for(concept.category))
    except ValueError as error:
        yield Finding(concept.concept_id, str(error), is_fatal=True)
    else:
        yield from (Finding(concept.concept_id, remark, is_fatal=False) for remark in _remarks(concept, vocabulary))
    mine = [prompt for prompt in prompts if prompt.is_for(concept.concept_id, concept.category)]
    yield from _bulk_findings(concept, mine, vocabulary)


def _check_training(concept: Concept, config: RunConfig, vocabulary: Vocabulary) -> None:
    method = config.inversion.init.method
    if method != "auto":  # "auto" takes a word of the model's own vocabulary
        initializer_ids(concept.initializer, vocabulary)
    if method == "encoder_output" and not concept.initializer:
        raise ValueError("the row has no initializer, but init.method 'encoder_output' starts from it; give it one")
    for template in training_templates(concept, class_cue=config.inversion.class_cue):
        text = f"{template} with <photo>" if config.inversion.per_image_tokens else template
        encode_prompt(text, {**standing_in(concept), "<photo>": [UNUSED_ID]}, vocabulary)


def _remarks(concept: Concept, vocabulary: Vocabulary) -> Iterator[str]:
    ids, words = vocabulary.tokenize(concept.initializer), concept.initializer.split()
    if len(ids) > _TOKENS_PER_WORD * len(words):
        yield (
            f"initializer {concept.initializer!r} is not in the model's vocabulary: it is spelled out in {len(ids)} "
            "tokens, whose mean is a poor start; use a plainer word"
        )
    if len(vocabulary.tokenize(concept.placeholder_token)) == 1:
        yield (
            f"placeholder {concept.placeholder_token!r} is a word of the model's own vocabulary: here it stands for "
            "the concept in every prompt, and diffusers refuses to load a file under it; '<...>' would be safe"
        )


def _bulk_findings(concept: Concept, prompts: Sequence[Prompt], vocabulary: Vocabulary) -> Iterator[Finding]:
    reasons = []
    num_outside = 0
    for prompt in prompts:
        template = prompt.template(concept.initializer)
        text = fill(template, concept.placeholder_token)
        try:
            if UNUSED_ID not in encode_prompt(text, _placeholder_ids(concept), vocabulary):
                raise ValueError(f"prompt {text!r} does not have the placeholder as a word of its own")
        except ValueError as error:
            reasons.append(str(error))
        num_outside += concept.placeholder_token in template.split()
    if reasons:
        text = f"{len(reasons)} of its {len(prompts)} prompts cannot be drawn: {reasons[0]}"
        yield Finding(concept.concept_id, text, is_fatal=True)
    if num_outside:
        text = f"{num_outside} prompts also have its placeholder {concept.placeholder_token!r} outside the hole"
        yield Finding(concept.concept_id, text, is_fatal=False)


def _placeholder_ids(concept: Concept) -> dict[str, range]:
    return {concept.placeholder_token: standing_in(concept)[HOLE]}


class _CachedTokenizer:
    """A tokenizer with a cache, because thousands of concepts ask for the same pieces of prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.end_of_text = tokenizer.end_of_text
        self.assemble = tokenizer.assemble
        self._ids = lru_cache(4096)(lambda text: tuple(tokenizer.tokenize(text)))

    def tokenize(self, text: str) -> list[int]:
        return list(self._ids(text))
