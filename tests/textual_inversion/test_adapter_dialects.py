"""Adapter files of other tools: kohya's, diffusers' and PEFT's keys, and no file at all for what is no plain LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from textual_inversion.adapter_dialects import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    check_lora,
    dump_diffusers_lora,
    dump_kohya,
    peft_files,
)
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.formats import from_bytes

Q, FC1 = "encoder.layers.0.self_attn.q_proj", "encoder.layers.11.mlp.fc1"
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.cross_attention"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def an_embedding(*names: str, kind: Any = "lora", encoders: tuple[str, ...] = ("clip_l",)) -> LearnedEmbedding:
    tensors = {name: (draw(2, 8), draw(4, 2)) for name in names or (Q, FC1)}
    return LearnedEmbedding(
        placeholder_token="<c>",
        vectors={key: torch.ones(1, 4) for key in encoders},
        adapter=LearnedAdapter(kind=kind, scale=1.5, tensors=tensors),
        metadata={"step": "250", "adapter": "adapter.safetensors"},
    )


PAIR = an_embedding(f"clip_l.{Q}", f"clip_g.{FC1}", encoders=("clip_l", "clip_g"))


def test_kohyas_keys_carry_their_alpha() -> None:
    """ComfyUI takes alpha as the rank where there is none: three quarters of this adapter's strength would be lost."""
    embedding = an_embedding()
    tensors, header = from_bytes(dump_kohya(embedding))
    path = "lora_te_text_model_encoder_layers_11_mlp_fc1"
    assert len(tensors) == 6
    assert embedding.adapter is not None
    assert torch.equal(tensors[f"{path}.lora_down.weight"], embedding.adapter.tensors[FC1][0])
    assert torch.equal(tensors[f"{path}.lora_up.weight"], embedding.adapter.tensors[FC1][1])
    assert tensors[f"{path}.alpha"].item() == 3.0  # scale 1.5 times rank 2
    assert tensors[f"{path}.alpha"].shape == ()
    assert "adapter" not in header
    assert header["step"] == "250"
    assert dump_kohya(embedding) == dump_kohya(an_embedding())


def test_each_text_encoder_has_its_prefix() -> None:
    assert {key.split("_text_model")[0] for key in load(dump_kohya(PAIR))} == {"lora_te1", "lora_te2"}
    assert {key.split(".")[0] for key in load(dump_diffusers_lora(PAIR))} == {"text_encoder", "text_encoder_2"}
    settings = json.loads(from_bytes(dump_diffusers_lora(PAIR))[1]["lora_adapter_metadata"])
    assert settings == {
        "text_encoder.r": 2, "text_encoder.lora_alpha": 3.0, "text_encoder.target_modules": [Q],
        "text_encoder_2.r": 2, "text_encoder_2.lora_alpha": 3.0, "text_encoder_2.target_modules": [FC1],
    }  # fmt: skip
    assert sorted(peft_files(PAIR)) == [
        f"{folder}/{name}" for folder in ("text_encoder", "text_encoder_2") for name in (PEFT_CONFIG, PEFT_WEIGHTS)
    ]


def test_pefts_folder_has_the_keys_of_both_generations_of_transformers() -> None:
    files = peft_files(an_embedding())
    config = json.loads(files[PEFT_CONFIG])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert config["target_modules"] == [Q, FC1]
    tensors = load(files[PEFT_WEIGHTS])
    assert len(tensors) == 8
    for outer in ("", "text_model."):
        assert torch.equal(tensors[f"base_model.model.{outer}{Q}.lora_B.weight"], draw(4, 2))


@pytest.mark.parametrize("embedding", [an_embedding(), PAIR])
def test_what_is_written_is_read_back_and_compared(embedding: LearnedEmbedding) -> None:
    check_lora(dump_kohya(embedding), embedding)
    check_lora(dump_diffusers_lora(embedding), embedding)
    for path, data in peft_files(embedding).items():
        if path.endswith(PEFT_WEIGHTS):
            encoder = "clip_g" if path.startswith("text_encoder_2") else "clip_l"
            check_lora(data, embedding, encoder)
    assert embedding.adapter is not None
    weaker = replace(embedding, adapter=replace(embedding.adapter, scale=1.0))
    for data in (dump_kohya(weaker), dump_diffusers_lora(weaker)):
        with pytest.raises(ValueError, match="does not read back as it was written"):
            check_lora(data, embedding)


@pytest.mark.parametrize("change", ["value", "missing half", "missing layer", "foreign key"])
def test_a_difference_is_noticed(change: str) -> None:
    embedding = an_embedding()
    for data in (dump_kohya(embedding), dump_diffusers_lora(embedding)):
        tensors, header = from_bytes(data)
        path = min(key for key in tensors if "alpha" not in key)
        if change == "value":
            tensors[path] = tensors[path] + 1
        elif change == "missing half":
            del tensors[path]
        elif change == "missing layer":
            tensors = {key: each for key, each in tensors.items() if "fc1" not in key}
        else:
            tensors["unet.x.weight"] = torch.ones(1)
        with pytest.raises(ValueError, match=r"does not read back|'unet.x.weight' is not a key of a LoRA"):
            check_lora(save(tensors, metadata=header), embedding)


@pytest.mark.parametrize("write", [dump_kohya, dump_diffusers_lora, peft_files])
@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (an_embedding(kind="causal"), r"kind 'causal' .*other tools would take it for a LoRA.*kind 'lora' .recipe"),
        (an_embedding(Q, CROSS, kind="causal"), r"'causal' \(cross-attention\).*load_into_pipeline"),
        (an_embedding(CROSS), r"\(cross-attention\)"),
        (an_embedding(encoders=("bert",)), "one of the text encoder 'bert'; other tools load adapters of clip_l and"),
        (an_embedding(f"t5xxl.{Q}", encoders=("clip_l", "t5xxl")), "one of the text encoder 't5xxl'"),
        (replace(an_embedding(), adapter=None), "was learned without an adapter"),
    ],
)
def test_what_a_loader_would_take_for_a_lora_is_refused(write: Any, embedding: LearnedEmbedding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(embedding)
