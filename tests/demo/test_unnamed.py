"""Words made from pictures stand beside the vocabulary and leave it as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from demo import unnamed
from demo.tokenizer import make_tokenizer
from demo.unnamed import UNNAMED, OpenVocabulary, WordsFromPictures, features_of, open_vocabulary, unnamed_tokenizer

TOKENS, WIDTH = 20, 8
IDS = torch.tensor([[1, 5, TOKENS, 2], [TOKENS, 3, TOKENS, 2], [1, 5, 6, 2]])
"""Three captions; the id `TOKENS` is the unnamed word."""


def _table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(TOKENS, WIDTH)


def _text_encoder(num_tokens: int = TOKENS) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=num_tokens, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def test_known_ids_have_the_rows_of_the_table_and_the_unnamed_id_the_given_ones() -> None:
    table = _table()
    vocabulary = OpenVocabulary(table)
    known = IDS.masked_fill(IDS == TOKENS, 0)
    assert torch.equal(vocabulary(known), table(known))
    vocabulary.rows = torch.randn(len(IDS), WIDTH)
    assert torch.equal(vocabulary(known), table(known))
    found = vocabulary(IDS)
    for caption, token in np.ndindex(*IDS.shape):
        index = int(IDS[caption, token])
        expected = vocabulary.rows[caption] if index == TOKENS else table.weight[index]
        assert torch.equal(found[caption, token], expected)


def test_gradients_reach_the_given_rows_and_no_row_of_the_table_for_them() -> None:
    vocabulary = OpenVocabulary(_table())
    vocabulary.rows = torch.zeros(len(IDS), WIDTH, requires_grad=True)
    vocabulary(IDS).sum().backward()
    assert vocabulary.rows.grad is not None
    assert vocabulary.rows.grad[:, 0].tolist() == [1, 2, 0]  # unnamed words of each caption
    assert vocabulary.table.weight.grad is not None
    assert vocabulary.table.weight.grad[:, 0].tolist() == [0, 2, 3, 1, 0, 2, 1, *[0] * 13]


def test_opening_keeps_order_and_number_of_parameters() -> None:
    encoder = _text_encoder()
    before = [id(parameter) for parameter in encoder.parameters()]
    vocabulary = open_vocabulary(encoder)
    assert [id(parameter) for parameter in encoder.parameters()] == before
    assert encoder.get_input_embeddings() is vocabulary


def test_an_unnamed_word_is_encoded_like_a_word_with_that_row() -> None:
    encoder = _text_encoder()
    plain = IDS.masked_fill(IDS == TOKENS, 7)
    with torch.no_grad():
        expected = encoder(input_ids=plain).last_hidden_state
        vocabulary = open_vocabulary(encoder)
        vocabulary.rows = vocabulary.table.weight[7].expand(len(IDS), -1)
        found = encoder(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_words_from_pictures_are_rows_that_the_generator_decides() -> None:
    table = _table().weight.detach()
    words = WordsFromPictures(12, table)
    features = torch.randn(30, 12)

    def rows(seed: int) -> torch.Tensor:
        return words(features, torch.Generator().manual_seed(seed))

    assert rows(0).shape == (30, WIDTH)
    assert torch.equal(rows(0), rows(0))
    noise = (rows(0) - rows(1)).std() / 2**0.5
    assert 0.08 * table.std() < noise < 0.12 * table.std()
    swapped = words(features.flip(0), torch.Generator().manual_seed(0))
    assert (swapped - rows(0)).abs().max() > 4 * noise, "other pictures, other rows"


def test_the_unnamed_word_is_one_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["a photo of a cat"] * 5, tmp_path, vocab_size=540)
    size = len(tokenizer)
    known = tokenizer("a photo of a cat").input_ids
    ids = unnamed_tokenizer(tokenizer)(f"a photo of a {UNNAMED} cat").input_ids
    assert [index for index in ids if index >= size] == [size]
    assert [index for index in ids if index != size] == known == tokenizer("a photo of a cat").input_ids


def test_features_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = _text_encoder().config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    latents = torch.randn(5, 4, 8, 8).half()
    whole = features_of(clip, pictures, latents)
    assert whole.shape == (5, WIDTH + 4 * 4 * 4)
    assert whole.dtype == torch.float32
    monkeypatch.setattr(unnamed, "_FEATURE_BATCH", 2)
    torch.testing.assert_close(features_of(clip, pictures, latents), whole)
