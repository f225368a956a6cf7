"""Where a concept's rows start: at a word, a phrase, the vocabulary's mean, or an embedding handed in, be it learned
before or chosen by a look at the photos (`StartChooser`).

A random start is the vocabulary's mean (no initializer) with `init.noise` 1: a draw from the vocabulary's own
distribution, coordinate by coordinate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion import amortise
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.paired_augment import AUGMENTATION_TOKENS
from textual_inversion.prompts import encode_prompt, initializer_ids
from textual_inversion.rng import generator_for
from textual_inversion.tokens import TokenTable

if TYPE_CHECKING:
    from textual_inversion.extractors import ClipExtractor

MIN_NOISE_BETWEEN_ROWS = 0.1
"""Of rows after the first, in vocabulary deviations: equal rows get equal gradients and never part."""


def initial_rows(
    concept: Concept, backbone: Backbone, *, noise: float, seed: int, start: LearnedEmbedding | None = None
) -> dict[str, Tensor]:
    """Text encoder key -> [num_vectors, dim] float32 on the CPU, decided by the concept and the seed alone.

    `noise` is the standard deviation added, in vocabulary deviations per coordinate. `start` takes the place of the
    initializer; a single row of it is where all rows start. Raises BadInput if `start` does not fit the model or the
    concept.
    """
    ids = initializer_ids(concept.initializer, backbone.vocabularies)
    generator = generator_for(seed, concept.concept_id, "init")
    rows = {}
    for key, table in sorted(backbone.token_tables.items()):
        draw = torch.randn(concept.num_vectors, table.dim, generator=generator)
        amount = torch.full((concept.num_vectors, 1), noise)
        mean = _mean_vector(table, ids[key])[None] if start is None else _vectors(start, key, concept, table)
        if len(mean) == 1:
            amount[1:].clamp_(min=MIN_NOISE_BETWEEN_ROWS)
        deviation = table.deviation if amount.any() else 0
        rows[key] = mean + amount * deviation * draw
    return rows


def class_vectors(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    """Text encoder key -> [dim] float32 CPU: the mean of the initializer's vectors, or of the whole vocabulary's."""
    ids = initializer_ids(concept.initializer, backbone.vocabularies)
    return {key: _mean_vector(table, ids[key]) for key, table in backbone.token_tables.items()}


def encoder_output(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    """Cross-Initialization (Pang et al. 2024): what the text encoder makes of the initializer, alone in a prompt, at
    the initializer's own place (the mean of its places if it has several tokens): key -> [dim] float32 CPU.

    Raises BadInput without an initializer, and where the encoder's states cannot stand in for its vectors.
    """
    initializer = initializer_ids(concept.initializer, backbone.vocabularies)
    if not concept.initializer:
        raise BadInput(
            f"concept {concept.concept_id!r} has no initializer, which init.method 'encoder_output' starts from; give "
            "it one, or set init.method to 'auto'"
        )
    prompt = encode_prompt(concept.initializer, {}, backbone.vocabularies)
    with torch.no_grad():
        states = backbone.encoder_states({key: torch.tensor([ids]) for key, ids in prompt.items()})
    vectors = {}
    for key, ids in initializer.items():
        first = prompt[key].index(ids[0])
        vectors[key] = states[key][0].float().cpu()[first : first + len(ids)].mean(0)
        dim = backbone.token_tables[key].dim
        if len(vectors[key]) != dim:
            raise BadInput(
                f"init.method 'encoder_output': the states of text encoder {key!r} are {len(vectors[key])} wide but "
                f"its vectors {dim}; on this model use another method"
            )
    return vectors


def augmentation_rows(backbone: Backbone) -> dict[str, Tensor]:
    """Where the rows of the augmentation tokens start, in the order of `AUGMENTATION_TOKENS`: text encoder key ->
    [tokens, dim] float32 CPU.

    One row a token, the mean of its initial words' vectors; TextBoost's code has one for each of their sub-tokens. So
    their number does not depend on the tokenizer, and three of them fit a prompt even where words are spelled out.
    """
    words = list(AUGMENTATION_TOKENS.values())
    return {key: torch.stack(vectors) for key, vectors in sorted(_word_vectors(words, backbone).items())}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a concept starts."""

    concept: Concept
    """With the initializer that was chosen, if one was."""
    embedding: LearnedEmbedding | None
    """For `Assignment.start`; None leaves it to the initializer."""
    reason: str
    """In words, for the record: the method, what it chose, and why it did not if it was unsure."""


@dataclass(frozen=True, slots=True)
class Example:
    """A concept learned before, by the same model."""

    embedding: LearnedEmbedding
    photos: Sequence[Image.Image]


class StartChooser:
    """Decides by a look at each concept's photos where its rows start, as `init.method` says.

    What all concepts share is computed here, once; decided by the model, the extractor, the settings and the seed
    alone. Threads may share one chooser.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: InitConfig,
        extractor: ClipExtractor | None = None,
        *,
        seed: int = 0,
        examples: Iterable[Example] = (),
    ) -> None:
        """`extractor` is what `auto` and `amortised` see with; `examples` are fitted on by `amortised` beside words,
        and taken one by one.
        Raises ValueError without one where it is needed, or if the model knows too few words."""
        self._backbone, self._method, self._extractor = backbone, config.method, extractor
        if config.method not in ("auto", "amortised"):
            return
        if extractor is None:
            raise ValueError(f"init.method {config.method!r} looks at the photos with a CLIP; set `extractor`")
        self._words = list(config.words) or backbone.words()
        if len(self._words) < 3:
            raise ValueError(f"init.words = {self._words!r}: must be 3 words or more for init.method {config.method!r}")
        self._texts = extractor.texts([amortise.WORD_PROMPT.format(word) for word in self._words])
        if config.method == "amortised":
            self._regression = self._fit(extractor, seed, examples)

    def __call__(self, concept: Concept, photos: Sequence[Image.Image]) -> Start:
        """Raises BadInput, naming the concept, if it lacks what the method needs."""
        if self._method == "words":
            return Start(concept, None, "words")
        if self._method == "encoder_output":
            return _started(concept, encoder_output(concept, self._backbone), "encoder_output")
        assert self._extractor is not None
        feature = F.normalize(self._extractor.images(photos).mean(0), dim=0)
        return self._nearest(concept, feature) if self._method == "auto" else self._predicted(concept, feature)

    def _nearest(self, concept: Concept, feature: Tensor) -> Start:
        cosines = self._texts @ feature
        best = int(cosines.argmax())
        concept = replace(concept, initializer=self._words[best])
        reason = f"auto: {concept.initializer} (cosine {float(cosines[best]):.2f})"
        return _started(concept, class_vectors(concept, self._backbone), reason)

    def _predicted(self, concept: Concept, feature: Tensor) -> Start:
        assert self._extractor is not None
        own = class_vectors(concept, self._backbone)
        word = None
        if concept.initializer:
            word = self._extractor.texts([amortise.WORD_PROMPT.format(concept.initializer)])[0], own
        prediction = self._regression.predict(feature, word)
        if prediction.unreliable_because:
            return _started(concept, own, f"words, amortised was unsure: {prediction.unreliable_because}")
        return _started(concept, prediction.vectors, "amortised")

    def _fit(self, extractor: ClipExtractor, seed: int, examples: Iterable[Example]) -> amortise.StartRegression:
        backbone, words = self._backbone, self._words
        vectors = _word_vectors(words, backbone)
        learned = []
        for example in examples:
            learned.append(F.normalize(extractor.images(example.photos).mean(0), dim=0))
            for key in vectors:
                vectors[key].append(example.embedding.vectors[key].float().mean(0))
        drawn = amortise.choose_words_to_draw(len(words))
        pictures = amortise.draw_words(backbone, [words[i] for i in drawn], seed)
        return amortise.fit_start_regression(
            self._texts,
            {key: torch.stack(rows) for key, rows in vectors.items()},
            extractor.images(pictures),
            drawn,
            torch.stack(learned) if learned else None,
        )


def _started(concept: Concept, vectors: Mapping[str, Tensor], reason: str) -> Start:
    """One row for all of the concept's."""
    rows = {key: vector[None] for key, vector in vectors.items()}
    return Start(concept, LearnedEmbedding(placeholder_token=concept.placeholder_token, vectors=rows), reason)


def _mean_vector(table: TokenTable, ids: Sequence[int]) -> Tensor:
    """Mean of these tokens' vectors, or of the whole vocabulary's if there are none -> [dim] float32 CPU."""
    return table.weight[list(ids)].float().mean(0).cpu() if ids else table.mean


def _word_vectors(words: Sequence[str], backbone: Backbone) -> dict[str, list[Tensor]]:
    """Return each word's mean vector: text encoder key -> [dim] float32 CPU, word by word."""
    return {
        key: [_mean_vector(table, backbone.vocabularies[key].tokenize(word)) for word in words]
        for key, table in backbone.token_tables.items()
    }


def _vectors(start: LearnedEmbedding, key: str, concept: Concept, table: TokenTable) -> Tensor:
    """The start's own rows for one text encoder, checked: one for each of the concept's, or one for all."""
    wanted = (concept.num_vectors, table.dim)
    found = tuple(start.vectors[key].shape) if key in start.vectors else None
    if found not in (wanted, (1, table.dim)):
        raise BadInput(
            f"embedding {start.placeholder_token!r} holds {found or 'nothing'} for text encoder {key!r}, but concept "
            f"{concept.concept_id!r} on this model needs {wanted}; start from an embedding of the same model and "
            "num_vectors"
        )
    return start.vectors[key].float().cpu()
