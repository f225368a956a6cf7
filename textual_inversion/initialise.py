"""Initial values of a concept's rows: a word's vectors, a phrase's, the vocabulary's mean, or a given embedding.

Random initial rows are the vocabulary's mean (no initializer) with `init.noise` 1: a draw from the vocabulary's own
distribution, coordinate by coordinate. `start_choice` decides which embedding is given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.prompts import initializer_ids
from textual_inversion.rng import generator_for
from textual_inversion.tokens import TokenTable

MIN_NOISE_BETWEEN_ROWS = 0.1
"""Least noise on the rows after the first, in units of the vocabulary's deviation per coordinate. Equal rows would get
equal gradients and stay equal."""


def learning_encoders(backbone: Backbone, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the keys of the text encoders in which rows are learned: those wanted, or else the family's.

    Raises ValueError for a key that the model does not have.
    """
    unknown = sorted(set(wanted) - backbone.token_tables.keys())
    if unknown:
        raise ValueError(
            f"text_encoders names {unknown[0]!r}, but this model's text encoders are {', '.join(backbone.token_tables)}"
        )
    return tuple(
        key for key, table in backbone.token_tables.items() if (key in wanted if wanted else table.learns_rows)
    )


def initial_rows(
    concept: Concept,
    backbone: Backbone,
    *,
    noise: float,
    seed: int,
    start: LearnedEmbedding | None = None,
    learning: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return a concept's initial rows: text encoder key -> [num_vectors, dim] float32 on the CPU.

    The rows depend on the concept, the model, the arguments and nothing else. Rows of a text encoder that learns none
    get no noise: each is the mean of the initializer's vectors, or the start's row.

    noise: standard deviation of the noise added, in units of the vocabulary's deviation per coordinate.
    learning: keys of the text encoders in which rows are learned; None for the family's (`learning_encoders`).
    start: embedding whose rows take the place of the initializer's vectors; a single row is the start of all rows.
    Raises BadInput if `start` does not fit the model or the concept.
    """
    ids = initializer_ids(concept.initializer, backbone.vocabularies)
    generator = generator_for(seed, concept.concept_id, "init")
    learning = learning_encoders(backbone) if learning is None else learning
    rows = {}
    for key, table in sorted(backbone.token_tables.items()):
        draw = torch.randn(concept.num_vectors, table.dim, generator=generator)
        amount = torch.full((concept.num_vectors, 1), noise)
        mean = _mean_vector(table, ids[key])[None] if start is None else _start_vectors(start, key, concept, table)
        if len(mean) == 1:
            amount[1:].clamp_(min=MIN_NOISE_BETWEEN_ROWS)
        if key not in learning:
            amount[:] = 0
        deviation = table.deviation if amount.any() else 0
        rows[key] = mean + amount * deviation * draw
    return rows


def class_vectors(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    """Return the mean of the initializer's vectors, or of the whole vocabulary's without one.

    Text encoder key -> [dim] float32 on the CPU.
    """
    ids = initializer_ids(concept.initializer, backbone.vocabularies)
    return {key: _mean_vector(table, ids[key]) for key, table in backbone.token_tables.items()}


def encoder_output(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    """Cross-Initialization (Pang et al. 2024): return the text encoders' output for the initializer, a row for each
    of the concept's vectors.

    Text encoder key -> [num_vectors, dim] float32 on the CPU. The prompt holds the initializer alone, and each row is
    the state at its own token's position (lyuPang/CrossInitialization 0b1e39a, utils.py:46-69, which demands as many
    tokens as rows). Here an initializer with fewer tokens than rows is repeated in the prompt, and of one with more,
    consecutive tokens share a row, the mean of their states. Raises BadInput without an initializer, and for an encoder
    whose states are not as wide as its vectors.
    """
    num_vectors = concept.num_vectors
    if not concept.initializer:
        raise BadInput(
            f"concept {concept.concept_id!r} has no initializer, which init.method 'encoder_output' starts from; give "
            "it one, or set init.method to 'auto'"
        )
    tokens = {
        key: (ids * num_vectors)[: max(len(ids), num_vectors)]
        for key, ids in initializer_ids(concept.initializer, backbone.vocabularies).items()
    }
    prompt = {key: backbone.vocabularies[key].assemble(ids) for key, ids in tokens.items()}
    with torch.no_grad():
        states = backbone.encoder_states({key: torch.tensor([ids]) for key, ids in prompt.items()})
    rows = {}
    for key, ids in tokens.items():
        table = backbone.token_tables[key]
        if not table.learns_rows:
            rows[key] = _mean_vector(table, ids).expand(num_vectors, -1).clone()
            continue
        first = prompt[key].index(ids[0])
        own = states[key][0, first : first + len(ids)].float().cpu()
        if own.shape[1] != table.dim:
            raise BadInput(
                f"init.method 'encoder_output': the states of text encoder {key!r} are {own.shape[1]} wide but its "
                f"vectors {table.dim}; on this model use another method"
            )
        rows[key] = torch.stack([part.mean(0) for part in torch.tensor_split(own, num_vectors)])
    return rows


def augmentation_rows(backbone: Backbone, tokens: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the initial rows of augmentation tokens (name -> initial words, `paired_augment.augmentation_tokens`).

    Text encoder key -> [tokens, dim] float32 on the CPU, in the order of `tokens`. Each token has one row, the mean of
    its initial words; TextBoost's code has a row for each of their sub-tokens. With one row, the number of rows does
    not depend on the tokenizer, and three tokens fit a prompt even where the tokenizer spells words out.
    """
    words = list(tokens.values())
    return {key: torch.stack(vectors) for key, vectors in sorted(word_vectors(words, backbone).items())}


def word_vectors(words: Sequence[str], backbone: Backbone) -> dict[str, list[Tensor]]:
    """Return the mean vector of each word or phrase: text encoder key -> [dim] float32 on the CPU for each word."""
    return {
        key: [_mean_vector(table, backbone.vocabularies[key].tokenize(word)) for word in words]
        for key, table in backbone.token_tables.items()
    }


def _mean_vector(table: TokenTable, ids: Sequence[int]) -> Tensor:
    """Return the mean of these tokens' vectors, or of the whole vocabulary's if there are none, [dim] float32 CPU."""
    return table.weight[list(ids)].float().mean(0).cpu() if ids else table.mean


def _start_vectors(start: LearnedEmbedding, key: str, concept: Concept, table: TokenTable) -> Tensor:
    """Return the start's rows for one text encoder, [num_vectors or 1, dim]. Raises BadInput for any other shape."""
    wanted = (concept.num_vectors, table.dim)
    found = tuple(start.vectors[key].shape) if key in start.vectors else None
    if found not in (wanted, (1, table.dim)):
        raise BadInput(
            f"embedding {start.placeholder_token!r} holds {found or 'nothing'} for text encoder {key!r}, but concept "
            f"{concept.concept_id!r} on this model needs {wanted}; start from an embedding of the same model and "
            "num_vectors"
        )
    return start.vectors[key].float().cpu()
