"""Where a concept's rows start: at a word, a phrase, the vocabulary's mean, or an embedding learned before.

A random start is the vocabulary's mean (no initializer) with `init.noise` 1: a draw from the vocabulary's own
distribution, coordinate by coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.families.base import Backbone
from textual_inversion.paired import AUGMENTATION_TOKENS
from textual_inversion.rng import generator_for
from textual_inversion.tokens import TokenTable

MIN_NOISE_BETWEEN_ROWS = 0.1
"""Of rows after the first, in vocabulary deviations: equal rows get equal gradients and never part."""


def initial_rows(
    concept: Concept, backbone: Backbone, *, noise: float, seed: int, start: LearnedEmbedding | None = None
) -> dict[str, Tensor]:
    """Text encoder key -> [num_vectors, dim] float32 on the CPU, decided by the concept and the seed alone.

    `noise` is the standard deviation added, in vocabulary deviations per coordinate. `start` takes the place of the
    initializer. Raises ValueError if `start` does not fit the model or the concept.
    """
    ids = backbone.tokenize(concept.initializer)
    generator = generator_for(seed, concept.concept_id, "init")
    rows = {}
    for key, table in sorted(backbone.token_tables.items()):
        draw = torch.randn(concept.num_vectors, table.dim, generator=generator)
        amount = torch.full((concept.num_vectors, 1), noise)
        if start is None:
            mean = _mean_vector(table, ids).expand(concept.num_vectors, -1)
            amount[1:].clamp_(min=MIN_NOISE_BETWEEN_ROWS)
        else:
            mean = _vectors(start, key, concept, table)
        deviation = table.weight.float().std(0).cpu()
        rows[key] = mean + amount * deviation * draw
    return rows


def class_vectors(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    """Text encoder key -> [dim] float32 CPU: the mean of the initializer's vectors, or of the whole vocabulary's."""
    ids = backbone.tokenize(concept.initializer)
    return {key: _mean_vector(table, ids) for key, table in backbone.token_tables.items()}


def augmentation_rows(backbone: Backbone) -> dict[str, Tensor]:
    """Where the rows of the augmentation tokens start, in the order of `AUGMENTATION_TOKENS`: text encoder key ->
    [tokens, dim] float32 CPU.

    One row a token, the mean of its initial words' vectors; TextBoost's code has one for each of their sub-tokens. So
    their number does not depend on the tokenizer, and three of them fit a prompt even where words are spelled out.
    """
    words = [backbone.tokenize(text) for text in AUGMENTATION_TOKENS.values()]
    return {
        key: torch.stack([_mean_vector(table, ids) for ids in words])
        for key, table in sorted(backbone.token_tables.items())
    }


def _mean_vector(table: TokenTable, ids: Sequence[int]) -> Tensor:
    """Mean of these tokens' vectors, or of the whole vocabulary's if there are none -> [dim] float32 CPU."""
    chosen = table.weight[list(ids)] if ids else table.weight
    return chosen.float().mean(0).cpu()


def _vectors(start: LearnedEmbedding, key: str, concept: Concept, table: TokenTable) -> Tensor:
    """The start's own rows for one text encoder, checked."""
    wanted = (concept.num_vectors, table.dim)
    found = tuple(start.vectors[key].shape) if key in start.vectors else None
    if found != wanted:
        raise ValueError(
            f"embedding {start.placeholder_token!r} holds {found or 'nothing'} for text encoder {key!r}, but concept "
            f"{concept.concept_id!r} on this model needs {wanted}; start from an embedding of the same model and "
            "num_vectors"
        )
    return start.vectors[key].float().cpu()
