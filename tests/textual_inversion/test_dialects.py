"""Embedding files of other tools: their documented layouts go out and come in, and what is none is named."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from textual_inversion.concept import LearnedEmbedding
from textual_inversion.dialects import (
    ONETRAINER,
    WEBUI,
    Layout,
    check_embedding,
    diffusers_files,
    dump_embedding,
    parse_embedding,
)
from textual_inversion.formats import dump_diffusers, from_bytes

ROWS = torch.arange(6.0).reshape(2, 3)
SINGLE = LearnedEmbedding(
    placeholder_token="<cat-toy>", vectors={"clip_l": ROWS}, class_noun="toy", metadata={"step": "500"}
)
PAIR = replace(SINGLE, vectors={"clip_l": ROWS, "clip_g": torch.ones(2, 5)})
THREE = replace(PAIR, vectors={**PAIR.vectors, "t5xxl": torch.full((2, 7), 0.5)})


def save(tensors: dict[str, Tensor], **options: Any) -> bytes:
    return save_safetensors({key: rows.clone() for key, rows in tensors.items()}, **options)


def torch_file(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("layout", "embedding", "keys"),
    [
        (WEBUI, SINGLE, {"emb_params": [2, 3]}),
        (ONETRAINER, SINGLE, {"emp_params": [2, 3]}),
        (WEBUI, PAIR, {"clip_l": [2, 3], "clip_g": [2, 5]}),
        (ONETRAINER, PAIR, {"clip_l": [2, 3], "clip_g": [2, 5]}),
        (WEBUI, THREE, {"clip_l": [2, 3], "clip_g": [2, 5], "t5xxl": [2, 7]}),
        (ONETRAINER, THREE, {"clip_l": [2, 3], "clip_g": [2, 5], "t5": [2, 7]}),
        (WEBUI, replace(THREE, vectors={"t5xxl": torch.ones(2, 7)}), {"t5xxl": [2, 7]}),
    ],
)
def test_the_layouts_keys_hold_the_rows(
    layout: Layout, embedding: LearnedEmbedding, keys: dict[str, list[int]]
) -> None:
    """[num_vectors, dim] float32, and only these keys: tools count them, or take the first."""
    data = dump_embedding(embedding, layout)
    tensors = load(data)
    assert {key: list(rows.shape) for key, rows in tensors.items()} == keys
    assert {rows.dtype for rows in tensors.values()} == {torch.float32}
    check_embedding(data, embedding)
    found = parse_embedding(data, "cat-toy-ti")
    assert found.placeholder_token == "cat-toy-ti"
    assert (found.class_noun, found.metadata["step"]) == ("toy", "500")
    assert found.vectors.keys() == embedding.vectors.keys()
    assert all(torch.equal(rows, embedding.vectors[key]) for key, rows in found.vectors.items())
    assert dump_embedding(embedding, layout) == data


def test_diffusers_has_a_file_for_each_text_encoder() -> None:
    assert diffusers_files(SINGLE) == {"clip_l": ("learned_embeds.safetensors", dump_diffusers(SINGLE))}
    files = diffusers_files(replace(THREE, vectors=dict(reversed(THREE.vectors.items()))))
    assert [(key, name, {key: list(rows.shape) for key, rows in load(data).items()})
            for key, (name, data) in files.items()] == [
        ("clip_l", "learned_embeds.safetensors", {"<cat-toy>": [2, 3]}),
        ("clip_g", "learned_embeds_2.safetensors", {"<cat-toy>": [2, 5]}),
        ("t5xxl", "learned_embeds_3.safetensors", {"<cat-toy>": [2, 7]}),
    ]  # fmt: skip
    for key, (_, data) in files.items():
        check_embedding(data, replace(THREE, vectors={key: THREE.vectors[key]}))
    flux = replace(THREE, vectors={key: THREE.vectors[key] for key in ("clip_l", "t5xxl")})
    assert [name for name, _ in diffusers_files(flux).values()] == [
        "learned_embeds.safetensors",
        "learned_embeds_2.safetensors",
    ]


def test_an_encoder_that_no_tool_knows_is_refused() -> None:
    ldm = replace(SINGLE, vectors={"bert": ROWS})
    with pytest.raises(ValueError, match="no tool here reads rows of the text encoder 'bert'"):
        dump_embedding(ldm, WEBUI)
    assert parse_embedding(diffusers_files(ldm)["bert"][1], "x").vectors.keys() == {"bert"}
    with pytest.raises(ValueError, match="'words'"):
        diffusers_files(replace(PAIR, vectors={"words": ROWS, "clip_l": ROWS}))


def test_a_difference_is_noticed() -> None:
    data = dump_embedding(PAIR, WEBUI)
    for other in (replace(PAIR, vectors={**PAIR.vectors, "clip_g": torch.zeros(2, 5)}), SINGLE):
        with pytest.raises(ValueError, match="does not read back"):
            check_embedding(data, other)


A1111 = {
    "string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "old-name", "step": 400,
    "sd_checkpoint": "cafe", "sd_checkpoint_name": "v1-5",
}  # fmt: skip
PARAMETER = nn.Parameter(ROWS.clone())


@pytest.mark.parametrize(
    ("data", "token", "vectors"),
    [
        (save({"<x>": ROWS}), "<x>", {"clip_l": ROWS}),
        (save({"<x>": ROWS[0].clone()}), "<x>", {"clip_l": ROWS[:1]}),
        (save({"<x>": ROWS.half()}), "<x>", {"clip_l": ROWS}),
        (save({"my_lora_cat": ROWS}), "my_lora_cat", {"clip_l": ROWS}),
        (save({"emb_params": ROWS.bfloat16()}), "file", {"clip_l": ROWS}),
        (save({"emp_params": ROWS}), "file", {"clip_l": ROWS}),
        (save({"*": ROWS}), "file", {"clip_l": ROWS}),
        (save({"clip_l": ROWS}), "file", {"clip_l": ROWS}),
        (save({"clip_g": ROWS}), "file", {"clip_g": ROWS}),
        (save({"clip_g": ROWS, "clip_l": ROWS[:, :2].clone()}), "file", {"clip_l": ROWS[:, :2], "clip_g": ROWS}),
        (save({"clip_l": ROWS, "t5": ROWS}), "file", {"clip_l": ROWS, "t5xxl": ROWS}),
        (torch_file({"<x>": ROWS[0]}), "<x>", {"clip_l": ROWS[:1]}),
        (torch_file({"<x>": PARAMETER}), "<x>", {"clip_l": ROWS}),
        (torch_file({"emb_params": ROWS}, _use_new_zipfile_serialization=False), "file", {"clip_l": ROWS}),
        (torch_file({"clip_l": ROWS, "clip_g": ROWS}), "file", {"clip_l": ROWS, "clip_g": ROWS}),
        (torch_file(A1111), "file", {"clip_l": ROWS}),
        (torch_file({**A1111, "string_to_param": {"mine": PARAMETER}}), "file", {"clip_l": ROWS}),
    ],
)
def test_every_layout_is_read(data: bytes, token: str, vectors: dict[str, Tensor]) -> None:
    found = parse_embedding(data, "file")
    assert found.placeholder_token == token
    assert found.vectors.keys() == vectors.keys()
    for key, rows in found.vectors.items():
        assert rows.dtype == torch.float32
        assert torch.equal(rows, vectors[key])
        assert not rows.requires_grad


def test_the_web_uis_own_facts_are_kept() -> None:
    assert dict(parse_embedding(torch_file(A1111), "file").metadata) == {"step": "400", "sd_checkpoint_name": "v1-5"}


LORA = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (LORA, "a LoRA or another adapter .* and not an embedding; load it as a LoRA"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": ROWS}, "it is a LoRA"),
        ({"unet.mid_block.attn.to_k_lora.up.weight": ROWS}, "it is a LoRA"),
        ({"lora_unet_mid.hada_w1_a": ROWS, "lora_unet_mid.alpha": torch.tensor(1.0)}, "it is a LoRA"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.causal.down.weight": ROWS}, "the adapter of a concept"),
        ({"unet.mid_block.x.cross_attention.up.weight": ROWS}, "the adapter of a concept; give the learned_embeds"),
        ({"emp_params_out": ROWS}, "'emp_params_out' is an output embedding of OneTrainer"),
        ({"emp_params": ROWS, "emp_params_out": ROWS}, "an output embedding of OneTrainer"),
        ({"clip_l": ROWS, "clip_g": ROWS, "clip_g_out": ROWS}, "'clip_g_out' is an output embedding"),
        ({"bundle_emb.cat.clip_l": ROWS}, "a LoRA with embeddings in it"),
        ({"model.diffusion_model.out.2.weight": ROWS, "b": ROWS}, "it is a checkpoint .2 tensors"),
        ({"text_model.embeddings.token_embedding.weight": ROWS}, "a network's weights"),
        ({"<s0>": ROWS, "<s1>": ROWS}, "it holds 2 embeddings .'<s0>', '<s1>'.; save each in a file of its own"),
        ({"text_encoders_0": ROWS, "text_encoders_1": torch.ones(2, 5)}, "found the keys 'text_encoders_0', 'text_enc"),
        ({"clip_l": ROWS, "clip_g": torch.ones(1, 5)}, r"it has \{'clip_.* rows; each .* equally many"),
        ({"clip_l": ROWS, "t5": ROWS, "t5xxl": ROWS}, "it holds 3 embeddings"),
        ({"clip_l": ROWS, "clip_g": torch.full((2, 5), torch.inf)}, "not finite"),
        ({"<x>": torch.ones(2, 3, 4)}, r"shape \[2, 3, 4\]"),
        ({"two words": ROWS}, "'two words' must be one word without spaces"),
        ({}, "found the keys none"),
    ],
)
def test_what_is_no_embedding_is_named(tensors: dict[str, Tensor], message: str) -> None:
    for data in (save(tensors), torch_file(tensors)):
        with pytest.raises(ValueError, match=message):
            parse_embedding(data, "file")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code of a file was run')",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            torch_file({"<x>": ROWS, "more": Evil()}),
            "holds more than tensors, .* could run code; .* save it as .safeten",
        ),
        (torch_file(Evil(), _use_new_zipfile_serialization=False), "could run code"),
        (torch_file({"string_to_param": nn.ParameterDict({"*": ROWS})}), "could run code"),
        (torch_file({"<x>": ROWS})[:200], "or is damaged"),
        (torch_file({"string_to_param": {"a": ROWS, "b": ROWS}}), "its string_to_param holds 'a', 'b', and not one"),
        (torch_file({"string_to_param": {}}), "holds none, and not one embedding"),
        (torch_file({"string_to_param": {"*": [1.0]}}), "holds '*', and not one embedding".replace("*", r"\*")),
        (torch_file({"state_dict": {"a": ROWS}, "epoch": 3}), "with 'epoch', 'state_dict', which is no tensor"),
        (torch_file([ROWS]), "with a list, and not with an embedding"),
        (b"", "the file is empty"),
        (b"<html>sign in</html>", "not a safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not a safetensors file"),
        (save({"<x>": ROWS})[:40], "not a safetensors file"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_embedding(data, "file")


def test_a_bare_tensor_takes_the_files_name() -> None:
    assert parse_embedding(torch_file(ROWS), "file").placeholder_token == "file"


def test_a_header_that_begins_like_an_archive_is_still_a_header() -> None:
    """A safetensors file whose header's length has the first byte of a pickle."""
    for padding in range(200):
        data = save({"<x>": ROWS}, metadata={"note": "x" * padding})
        if data[:1] == b"\x80":
            break
    assert data[:1] == b"\x80"
    assert parse_embedding(data, "file").placeholder_token == "<x>"


def test_the_header_says_where_it_comes_from() -> None:
    header = from_bytes(dump_embedding(PAIR, WEBUI))[1]
    assert (header["step"], header["prompt_as"], header["num_vectors"]) == ("500", "<cat-toy> toy", "2")
    json.dumps(header)
