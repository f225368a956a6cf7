"""The diffusers embedding file: what goes in comes out, and everything else is refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import check_written, dump_diffusers, from_diffusers, parse_diffusers, to_diffusers


def an_embedding(rows: torch.Tensor | None = None, word: str = "<cat-toy>") -> LearnedEmbedding:
    rows = torch.arange(6.0).reshape(2, 3) if rows is None else rows
    return LearnedEmbedding(
        placeholder_token=word, vectors={"clip_l": rows}, metadata={"base_model": "abc", "step": "500"}
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = dump_diffusers(an_embedding())
    found = parse_diffusers(data)
    assert found.placeholder_token == "<cat-toy>"
    assert torch.equal(found.vectors["clip_l"], an_embedding().vectors["clip_l"])
    check_written(data, an_embedding())

    (tmp_path / "e.safetensors").write_bytes(data)
    tensors = load_file(tmp_path / "e.safetensors")
    assert {token: list(rows.shape) for token, rows in tensors.items()} == {"<cat-toy>": [2, 3]}
    with safetensors.safe_open(tmp_path / "e.safetensors", "pt") as file:
        assert file.metadata() == found.metadata
    assert found.metadata == {
        "format": "pt", "base_model": "abc", "step": "500", "placeholder_token": "<cat-toy>", "text_encoder": "clip_l",
        "num_vectors": "2", "norm": "2.2361, 7.0711",
    }  # fmt: skip


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: not any(c.isspace() for c in t)),
)
def test_any_rows_and_any_word_survive(values: list[float], word: str) -> None:
    embedding = an_embedding(torch.tensor([values]), word)
    check_written(dump_diffusers(embedding), embedding)


def test_the_file_says_how_the_concept_is_prompted() -> None:
    plain = an_embedding()
    assert "prompt_as" not in to_diffusers(plain)[1]
    assert parse_diffusers(dump_diffusers(plain)).class_noun == ""

    phrase = replace(plain, class_noun="stuffed toy")
    found = parse_diffusers(dump_diffusers(phrase))
    assert found.metadata["prompt_as"] == "<cat-toy> stuffed toy"
    assert found.class_noun == "stuffed toy"
    again = parse_diffusers(dump_diffusers(replace(found, placeholder_token="<mine>")))
    assert (again.metadata["prompt_as"], again.class_noun) == ("<mine> stuffed toy", "stuffed toy")


def test_equal_embeddings_give_equal_bytes() -> None:
    turned = LearnedEmbedding(
        placeholder_token="<cat-toy>",
        vectors={"clip_l": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)},
        metadata={"step": "500", "base_model": "abc"},
    )
    assert {dump_diffusers(turned) for _ in range(5)} == {dump_diffusers(an_embedding())}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_tools_files_are_read(dtype: torch.dtype) -> None:
    """A single vector without a row axis, in half precision, without metadata."""
    found = parse_diffusers(save({"<other>": torch.ones(4, dtype=dtype)}))
    assert found.vectors["clip_l"].dtype == torch.float32
    assert found.vectors["clip_l"].shape == (1, 4)
    assert found.metadata == {}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": torch.ones(1, 2), "clip_g": torch.ones(1, 2)}, r"found the keys \['clip_g', 'clip_l'\]"),
        ({}, r"found the keys \[\]"),
        ({"<c>": torch.ones(1, 2, 3)}, r"shape \[1, 2, 3\]"),
        ({"<c>": torch.ones(0, 3)}, r"shape \[0, 3\]"),
        ({"<c>": torch.ones(2, 3, dtype=torch.int64)}, "dtype torch.int64"),
        ({"<c>": torch.tensor([[1.0, float("nan")]])}, "not finite"),
        ({"two words": torch.ones(1, 2)}, "one word without spaces"),
    ],
)
def test_anything_else_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers(tensors)
    with pytest.raises(ValueError, match=message):
        parse_diffusers(save(tensors))


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_file_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="not a safetensors file"):
        parse_diffusers(dump_diffusers(an_embedding())[:cut])


def test_rows_of_two_text_encoders_are_written_under_their_keys(tmp_path: Path) -> None:
    vectors = {"clip_l": torch.arange(4.0).view(2, 2), "clip_g": torch.ones(2, 3)}
    pair = LearnedEmbedding(placeholder_token="<c>", vectors=vectors, metadata={"step": "7"})
    data = dump_diffusers(pair)
    check_written(data, pair)
    found = parse_diffusers(data)
    assert list(found.vectors) == ["clip_l", "clip_g"]
    assert found.metadata["step"] == "7"
    assert dump_diffusers(found) == data
    (tmp_path / "e.safetensors").write_bytes(data)
    assert {key: list(rows.shape) for key, rows in load_file(tmp_path / "e.safetensors").items()} == {
        "clip_l": [2, 2], "clip_g": [2, 3],
    }  # fmt: skip
    other = LearnedEmbedding(placeholder_token="<c>", vectors={**vectors, "clip_g": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="does not read back"):
        check_written(data, other)


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="has no rows"):
        to_diffusers(LearnedEmbedding(placeholder_token="<c>", vectors={}))
    with pytest.raises(ValueError, match="not finite"):
        dump_diffusers(an_embedding(torch.full((1, 2), float("inf"))))


def test_a_difference_in_the_stored_file_is_noticed() -> None:
    data = dump_diffusers(an_embedding())
    other = bytearray(data)
    other[-1] ^= 1
    with pytest.raises(ValueError, match="does not read back"):
        check_written(bytes(other), an_embedding())
    with pytest.raises(ValueError, match="does not read back"):
        check_written(data, an_embedding(word="<dog>"))
