"""What a run would find wrong with good rows, found before it: texts that do not fit, photos that do not open.

Looks at tokenizer and pictures alone: no torch, no Ray, no GPU. The same functions refuse the same concepts in the run.
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
"""Each may hold a concept's decoded photos."""
_BATCH = 64
_TOKENS_PER_WORD = 3
"""Of an initializer; more, and it is spelled out in pieces that mean nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What somebody should know of a concept before the run."""

    concept_id: str
    text: str
    fails: bool
    """Whether the concept, or pictures of it, would fail; else it is a remark."""

    def __str__(self) -> str:
        return f"{'would fail' if self.fails else 'note'}: {self.concept_id}: {self.text}"


def examine(
    tasks: Iterable[ConceptTask], config: RunConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, photos: bool
) -> Iterator[Finding]:
    """Findings of the concepts that are to be learned, in their order; none of those that are fine. `photos`: also
    fetch and open every photo and mask.
    """
    vocabulary = _Remembering(tokenizer)
    rest = iter(tasks)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checks") as pool:
        while batch := [task.concept for task in islice(rest, _BATCH)]:
            opened = pool.map(lambda concept: photo_problem(concept, config), batch) if photos else [""] * len(batch)
            for concept, problem in zip(batch, opened, strict=True):
                yield from text_findings(concept, config, prompts, vocabulary)
                if problem:
                    yield Finding(concept.concept_id, problem, fails=True)


def photo_problem(concept: Concept, config: RunConfig) -> str:
    """Why its photos or masks cannot be used; empty if they can."""
    try:
        open_pictures(concept, config.photos)
    except (ValueError, OSError) as error:
        return redact(str(error))
    return ""


def text_findings(
    concept: Concept, config: RunConfig, prompts: Sequence[Prompt], vocabulary: Vocabulary
) -> Iterator[Finding]:
    """What the model's tokenizer makes of the initializer and of training, sample and bulk prompts.

    The augmentation tokens of TextBoost, drawn photo by photo, are not counted.
    """
    try:
        _check_training(concept, config, vocabulary)
        check_sample_prompts(vocabulary, concept, config.grid.prompts_for(concept.category))
    except ValueError as error:
        yield Finding(concept.concept_id, str(error), fails=True)
    else:
        yield from (Finding(concept.concept_id, remark, fails=False) for remark in _remarks(concept, vocabulary))
    mine = [prompt for prompt in prompts if prompt.is_for(concept.concept_id, concept.category)]
    yield from _bulk_findings(concept, mine, vocabulary)


def _check_training(concept: Concept, config: RunConfig, vocabulary: Vocabulary) -> None:
    method = config.inversion.init.method
    if method != "auto":  # which puts a word of the model's own in its place
        initializer_ids(concept.initializer, vocabulary)
    if method == "encoder_output" and not concept.initializer:
        raise ValueError("it has no initializer, which init.method 'encoder_output' starts from; give it one")
    for template in training_templates(concept, class_cue=config.inversion.class_cue):
        text = f"{template} with <photo>" if config.inversion.per_image_tokens else template
        encode_prompt(text, {**standing_in(concept), "<photo>": [UNUSED_ID]}, vocabulary)


def _remarks(concept: Concept, vocabulary: Vocabulary) -> Iterator[str]:
    ids, words = vocabulary.tokenize(concept.initializer), concept.initializer.split()
    if len(ids) > _TOKENS_PER_WORD * len(words):
        yield (
            f"initializer {concept.initializer!r} is not in the model's vocabulary: it is spelled out in {len(ids)} "
            "tokens, whose mean is a poor start; a plainer word is better"
        )
    if len(vocabulary.tokenize(concept.placeholder_token)) == 1:
        yield (
            f"placeholder {concept.placeholder_token!r} is a word of the model's own vocabulary: here it means the "
            "concept wherever a prompt says it, and diffusers refuses to load a file under it; '<...>' would be safe"
        )


def _bulk_findings(concept: Concept, prompts: Sequence[Prompt], vocabulary: Vocabulary) -> Iterator[Finding]:
    reasons = []
    elsewhere = 0
    for prompt in prompts:
        template = prompt.template(concept.initializer)
        text = fill(template, concept.placeholder_token)
        try:
            if UNUSED_ID not in encode_prompt(text, _word(concept), vocabulary):
                raise ValueError(f"prompt {text!r} does not have the placeholder as a word of its own")
        except ValueError as error:
            reasons.append(str(error))
        elsewhere += concept.placeholder_token in template.split()
    if reasons:
        text = f"{len(reasons)} of its {len(prompts)} prompts cannot be drawn: {reasons[0]}"
        yield Finding(concept.concept_id, text, fails=True)
    if elsewhere:
        text = f"{elsewhere} prompts have its placeholder {concept.placeholder_token!r} outside the hole, too"
        yield Finding(concept.concept_id, text, fails=False)


def _word(concept: Concept) -> dict[str, range]:
    return {concept.placeholder_token: standing_in(concept)[HOLE]}


class _Remembering:
    """A tokenizer that is asked for the same pieces of prompts by thousands of concepts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.end_of_text = tokenizer.end_of_text
        self.assemble = tokenizer.assemble
        self._ids = lru_cache(4096)(lambda text: tuple(tokenizer.tokenize(text)))

    def tokenize(self, text: str) -> list[int]:
        return list(self._ids(text))
