from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.toy_backbone import DIMS, VOCAB_SIZE, VOCABULARY, ToyBackbone
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig, InversionConfig
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.initialise import encoder_output, initial_rows
from textual_inversion.prompts import encode_prompt
from textual_inversion.start_choice import StartChooser

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
        torch.testing.assert_close(rows("cat")[key], table.weight[VOCABULARY.tokenize("cat")])


def test_a_phrase_starts_at_the_mean_of_its_tokens() -> None:
    expected = WEIGHT[VOCABULARY.tokenize("stuffed animal toy")].mean(0, keepdim=True)
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
    torch.testing.assert_close(first, WEIGHT[VOCABULARY.tokenize("cat")][0])
    assert not torch.equal(second, third)
    assert 0.05 < ((second - first) / WEIGHT.std(0)).std() < 0.2


def test_decided_by_the_concept_and_the_seed() -> None:
    start = rows("cat", 2, noise=0.5)["long"]
    assert torch.equal(start, rows("cat", 2, noise=0.5)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, seed=1)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, concept_id="d")["long"])


def test_one_row_of_a_start_is_where_all_begin() -> None:
    learned = {key: torch.randn(1, dim) for key, dim in DIMS.items()}
    first, second, third = rows("cat", 3, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))["long"]
    assert torch.equal(first, learned["long"][0])
    assert not torch.equal(second, third)
    assert 0.05 < ((second - first) / WEIGHT.std(0)).std() < 0.2


def test_the_whole_vocabulary_is_gone_through_only_if_need_be_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def note(name: str) -> None:
        function = getattr(Tensor, name)

        def noting(tensor: Tensor, *arguments: int) -> Tensor:
            done.extend([name] if len(tensor) == VOCAB_SIZE else [])
            return function(tensor, *arguments)

        monkeypatch.setattr(Tensor, name, noting)

    note("mean")
    note("std")
    backbone, word = ToyBackbone(), Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="cat")
    initial_rows(word, backbone, noise=0.0, seed=0)
    assert done == []
    for _ in range(2):
        initial_rows(word, backbone, noise=0.5, seed=0)
        initial_rows(replace(word, initializer=""), backbone, noise=0.0, seed=0)
    assert sorted(done) == ["mean"] * len(DIMS) + ["std"] * len(DIMS)


CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="dog toy")


def test_encoder_output_is_the_encoders_state_at_the_words_place(tiny_backbone: Backbone) -> None:
    start, end = 0, 3
    ids = stack_prompts([encode_prompt("dog toy", {}, tiny_backbone.vocabularies)])
    hidden = tiny_backbone.encode_prompts(ids, {}).hidden[0]
    vector = encoder_output(CONCEPT, tiny_backbone)["clip_l"]
    torch.testing.assert_close(vector, hidden[start + 1 : end].mean(0, keepdim=True))
    chosen = StartChooser(tiny_backbone, InitConfig(method="encoder_output"))(CONCEPT, [])
    assert chosen.embedding is not None
    assert torch.equal(chosen.embedding.vectors["clip_l"], vector)


@pytest.mark.parametrize(
    ("initializer", "num_vectors", "prompt", "positions"),
    [
        ("dog toy", 2, "dog toy", [[1], [2]]),  # the paper's code: as many tokens as rows
        ("dog", 3, "dog dog dog", [[1], [2], [3]]),
        ("dog toy", 3, "dog toy dog", [[1], [2], [3]]),
        ("cat dog toy", 2, "cat dog toy", [[1, 2], [3]]),
    ],
)
def test_encoder_output_is_for_each_row_the_state_at_its_own_token(
    tiny_backbone: Backbone, initializer: str, num_vectors: int, prompt: str, positions: list[list[int]]
) -> None:
    concept = replace(CONCEPT, initializer=initializer, num_vectors=num_vectors)
    ids = stack_prompts([encode_prompt(prompt, {}, tiny_backbone.vocabularies)])
    hidden = tiny_backbone.encode_prompts(ids, {}).hidden[0]
    expected = torch.stack([hidden[each].mean(0) for each in positions])
    torch.testing.assert_close(encoder_output(concept, tiny_backbone)["clip_l"], expected)
    started = StartChooser(tiny_backbone, InitConfig(method="encoder_output"))(concept, []).embedding
    first = initial_rows(concept, tiny_backbone, noise=0.0, seed=0, start=started)["clip_l"]
    torch.testing.assert_close(first, expected)  # without noise: the rows differ by themselves


def test_encoder_output_needs_a_word_and_states_as_wide_as_vectors(tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"'c' has no initializer, which init\.method 'encoder_output'"):
        encoder_output(replace(CONCEPT, initializer=""), tiny_backbone)
    with pytest.raises(ValueError, match=r"states of text encoder 'long' are 32 wide but its vectors 24"):
        encoder_output(CONCEPT, BACKBONE)
    with pytest.raises(ValueError, match=r"norm_control = 'clamp'.*'none' with init.method 'encoder_output'"):
        InversionConfig(init=InitConfig(method="encoder_output"))
