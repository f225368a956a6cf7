"""Checks of good rows before a run: texts that do not fit the model, photos that do not open.

Needs the tokenizer and the pictures alone: no torch, no Ray, no GPU. A run refuses the same concepts with the same
functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from pipeline.config import GenerationConfig, RunConfig
from pipeline.inputs.photos import open_pictures
from pipeline.inputs.prompt_table import Prompt, fill_holes
from pipeline.ledger.plan import ConceptTask
from pipeline.store.errors import describe_bug
from pipeline.store.redact import redact
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput
from textual_inversion.prompts import (
    HOLE,
    Vocabularies,
    Vocabulary,
    check_placeholder,
    check_sample_prompts,
    class_noun,
    encode_prompt,
    initializer_ids,
    name_in_prompt,
    placeholder_rows,
    training_templates,
    without_placeholder,
    words_in,
)

_THREADS = 4
"""Threads that open photos; each may hold one concept's decoded photos."""
_BATCH = 64
_OTHER_WORD = re.compile(r"<[^<>\s]+>")
"""Word in a negative prompt that must be a learned concept's placeholder token."""
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
    tasks: Iterable[ConceptTask],
    config: RunConfig,
    prompts: Sequence[Prompt],
    vocabularies: Vocabularies,
    *,
    photos: bool,
) -> Iterator[Finding]:
    """Yield the findings of the concepts that are to be learned, in their order.

    `photos`: also fetch and open every photo and mask.
    """
    vocabularies = {key: _CachedVocabulary(each) for key, each in vocabularies.items()}
    rest = iter(tasks)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="preflight") as pool:
        while batch := [task.concept for task in islice(rest, _BATCH)]:
            opened = pool.map(lambda concept: photo_problem(concept, config), batch) if photos else [""] * len(batch)
            for concept, problem in zip(batch, opened, strict=True):
                yield from _text_findings_or_bug(concept, config, prompts, vocabularies)
                if problem:
                    yield Finding(concept.concept_id, problem, is_fatal=True)


def photo_problem(concept: Concept, config: RunConfig) -> str:
    """Return the error of opening the concept's photos and masks; empty if all of them can be used."""
    try:
        open_pictures(concept, config.photos)
    except (BadInput, OSError) as error:
        return redact(str(error))
    except Exception as error:
        return describe_bug(error)
    return ""


def _text_findings_or_bug(
    concept: Concept, config: RunConfig, prompts: Sequence[Prompt], vocabularies: Vocabularies
) -> list[Finding]:
    """Return the findings of `text_findings`, or an unforeseen exception as one."""
    try:
        return list(text_findings(concept, config, prompts, vocabularies))
    except Exception as error:
        return [Finding(concept.concept_id, describe_bug(error), is_fatal=True)]


def text_findings(
    concept: Concept, config: RunConfig, prompts: Sequence[Prompt], vocabularies: Vocabularies
) -> Iterator[Finding]:
    """Yield the findings of the initializer and of the training, sample and bulk prompts under the model's tokenizer.

    The augmentation words that TextBoost adds to a prompt, photo by photo, are not counted.
    """
    try:
        _check_training(concept, config, vocabularies)
        prompts_of_grid = config.grid.prompts_for(concept.category)
        check_sample_prompts(vocabularies, concept, prompts_of_grid, class_cue=config.inversion.class_cue)
    except BadInput as error:
        yield Finding(concept.concept_id, str(error), is_fatal=True)
    else:
        yield from (Finding(concept.concept_id, remark, is_fatal=False) for remark in _remarks(concept, vocabularies))
    mine = [prompt for prompt in prompts if prompt.is_for(concept.concept_id, concept.category)]
    noun = class_noun(concept, class_cue=config.inversion.class_cue)
    yield from _bulk_findings(concept, mine, noun, config.generation, vocabularies)


def _check_training(concept: Concept, config: RunConfig, vocabularies: Vocabularies) -> None:
    check_placeholder(concept, vocabularies)
    method = config.inversion.init.method
    if method != "auto":  # "auto" takes a word of the model's own vocabulary
        initializer_ids(concept.initializer, vocabularies)
    if method == "encoder_output" and not concept.initializer:
        raise BadInput("the row has no initializer, but init.method 'encoder_output' starts from it; give it one")
    for template in training_templates(
        concept, class_cue=config.inversion.class_cue, templates=config.inversion.templates
    ):
        text = f"{template} with <photo>" if config.inversion.per_image_tokens else template
        encode_prompt(text, {**placeholder_rows(concept), "<photo>": [concept.num_vectors]}, vocabularies)


def _remarks(concept: Concept, vocabularies: Vocabularies) -> Iterator[str]:
    num_tokens = max(len(each.tokenize(concept.initializer)) for each in vocabularies.values())
    if num_tokens > _TOKENS_PER_WORD * len(concept.initializer.split()):
        yield (
            f"initializer {concept.initializer!r} is not in the model's vocabulary: it is spelled out in {num_tokens} "
            "tokens, whose mean is a poor start; use a plainer word"
        )


def _bulk_findings(
    concept: Concept, prompts: Sequence[Prompt], noun: str, config: GenerationConfig, vocabularies: Vocabularies
) -> Iterator[Finding]:
    token = concept.placeholder_token
    reasons = []
    num_outside = 0
    for prompt in prompts:
        text = prompt.filled(token, concept.initializer, name_in_prompt(token, noun))
        try:
            encode_prompt(text, {token: placeholder_rows(concept)[HOLE]}, vocabularies)
            if not words_in(text, [token]):
                raise BadInput(f"prompt {text!r} does not have the placeholder as a word of its own")
            negative = fill_holes(
                prompt.negative or config.negative_prompt, token, concept.initializer, name_in_prompt(token, noun)
            )
            if negative:
                _check_negative(concept, negative, prompt.guidance_scale, config, vocabularies)
        except BadInput as error:
            reasons.append(str(error))
        num_outside += token in prompt.filled(HOLE, concept.initializer, name_in_prompt(HOLE, noun)).split()
    if reasons:
        text = f"{len(reasons)} of its {len(prompts)} prompts cannot be drawn: {reasons[0]}"
        yield Finding(concept.concept_id, text, is_fatal=True)
    if num_outside:
        text = f"{num_outside} prompts also have its placeholder {token!r} outside the hole"
        yield Finding(concept.concept_id, text, is_fatal=False)


def _check_negative(
    concept: Concept, text: str, scale: float | None, config: GenerationConfig, vocabularies: Vocabularies
) -> None:
    """Raise BadInput for a negative prompt that cannot be drawn, as far as that is seen without the embeddings of
    `generation.learned`: each is counted as one token here."""
    if (scale or config.sampling.guidance_scale) == 1:
        raise BadInput(f"negative prompt {text!r} has no effect without guidance, and the guidance scale is 1")
    token = concept.placeholder_token
    words = _OTHER_WORD.findall(without_placeholder(text, token))
    if words and not config.learned:
        raise BadInput(
            f"negative prompt {text!r}: {words[0]} is no learned concept's placeholder token; name the run or the file "
            "that has it in generation.learned"
        )
    rows = placeholder_rows(concept)[HOLE]
    others = {word: [rows.stop + i] for i, word in enumerate(words)}
    encode_prompt(text, {**others, token: rows}, vocabularies)


class _CachedVocabulary:
    """A vocabulary with a cache, because thousands of concepts ask for the same pieces of prompts."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.size = vocabulary.size
        self.end_of_text = vocabulary.end_of_text
        self.unknown = vocabulary.unknown
        self.max_tokens = vocabulary.max_tokens
        self.assemble = vocabulary.assemble
        self._ids = lru_cache(4096)(lambda text: tuple(vocabulary.tokenize(text)))

    def tokenize(self, text: str) -> list[int]:
        return list(self._ids(text))
