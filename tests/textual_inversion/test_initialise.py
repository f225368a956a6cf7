from __future__ import annotations

import pytest
import torch

from tests.toy_backbone import DIMS, ToyBackbone
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.initialise import initial_rows

BACKBONE = ToyBackbone()
WEIGHT = BACKBONE.token_tables["long"].weight


def rows(
    initializer: str = "", num_vectors: int = 1, *, concept_id: str = "c", noise: float = 0.0, seed: int = 0,
    start: LearnedEmbedding | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    concept = Concept(
        concept_id=concept_id,
        placeholder_token="<c>",
        images=("x",),
        initializer=initializer,
        num_vectors=num_vectors,
    )
    return initial_rows(concept, BACKBONE, noise=noise, seed=seed, start=start)


def test_a_word_starts_at_its_vector() -> None:
    for key, table in BACKBONE.token_tables.items():
        torch.testing.assert_close(rows("cat")[key], table.weight[BACKBONE.tokenize("cat")])


def test_a_phrase_starts_at_the_mean_of_its_tokens() -> None:
    expected = WEIGHT[BACKBONE.tokenize("stuffed animal toy")].mean(0, keepdim=True)
    torch.testing.assert_close(rows("stuffed animal toy")["long"], expected)


def test_nothing_starts_at_the_vocabularys_mean() -> None:
    torch.testing.assert_close(rows()["long"], WEIGHT.mean(0, keepdim=True))


def test_an_embedding_starts_where_it_ended() -> None:
    learned = {key: torch.randn(2, dim) for key, dim in DIMS.items()}
    started = rows("cat", 2, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))
    assert all(torch.equal(started[key], learned[key]) for key in DIMS)


def test_an_embedding_that_does_not_fit() -> None:
    learned = {key: torch.randn(2, dim) for key, dim in DIMS.items()}
    with pytest.raises(ValueError, match=r"'<old>' holds \(2, 24\) for text encoder 'long'.* needs \(3, 24\)"):
        rows("cat", 3, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))
    del learned["short"]
    with pytest.raises(ValueError, match="holds nothing for text encoder 'short'"):
        rows("cat", 2, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))


def test_random_rows_are_spread_like_the_vocabulary() -> None:
    drawn = rows(num_vectors=2000, noise=1.0)["long"]
    torch.testing.assert_close(drawn.mean(0), WEIGHT.mean(0), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.std(0), WEIGHT.std(0), atol=0.04, rtol=0)


def test_further_rows_differ_even_without_noise() -> None:
    first, second, third = rows("cat", 3)["long"]
    torch.testing.assert_close(first, WEIGHT[BACKBONE.tokenize("cat")][0])
    assert not torch.equal(second, third)
    assert 0.05 < ((second - first) / WEIGHT.std(0)).std() < 0.2


def test_decided_by_the_concept_and_the_seed() -> None:
    start = rows("cat", 2, noise=0.5)["long"]
    assert torch.equal(start, rows("cat", 2, noise=0.5)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, seed=1)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, concept_id="d")["long"])
