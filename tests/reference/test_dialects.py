"""Files in other tools' layouts, read by those tools' own loaders that are installed here: diffusers and PEFT.

A loaded file makes the same text states, or the same picture, as the concept here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny_models import DIM
from textual_inversion.adapter_dialects import dump_diffusers_lora, dump_kohya, peft_files
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.dialects import ONETRAINER, WEBUI, diffusers_files, dump_embedding
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.lora import TARGETS, initial_adapter
from textual_inversion.prompts import encode_prompt

WORD = "<cat-toy>"
PROMPT = f"a photo of a {WORD} and a clock, on the {WORD} beach"


@pytest.fixture
def pipeline(tiny_model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)


def an_embedding(backbone: Backbone, num_vectors: int = 2) -> LearnedEmbedding:
    """With an adapter whose alpha is neither 1 nor its rank."""
    generator = torch.Generator().manual_seed(0)
    start = initial_adapter(backbone.adapter_layers, TARGETS, 2, generator)
    tensors = {name: (down, 0.3 * torch.randn(up.shape, generator=generator)) for name, (down, up) in start.items()}
    return LearnedEmbedding(
        placeholder_token=WORD,
        vectors={"clip_l": 0.3 * torch.randn(num_vectors, DIM, generator=generator)},
        adapter=LearnedAdapter(kind="lora", scale=1.7, tensors=tensors),
    )


def our_states(backbone: Backbone, embedding: LearnedEmbedding) -> Tensor:
    ids = encode_prompt(PROMPT, {WORD: range(embedding.num_vectors)}, backbone.vocabularies)
    prompt = stack_prompts([ids])
    if embedding.adapter is None:
        return backbone.encode_prompts(prompt, embedding.vectors).hidden
    from textual_inversion.lora import group_adapters

    acts = {key: torch.ones(prompt[key].shape[1], dtype=torch.bool) for key in prompt}
    adapters = group_adapters([[(embedding.adapter, acts)]], torch.device("cpu"))
    return backbone.encode_prompts(prompt, embedding.vectors, adapters).hidden


def their_states(pipeline: Any) -> Tensor:
    states: Tensor = pipeline.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0]
    return states


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers", WEBUI, ONETRAINER])
def test_diffusers_reads_every_layout_of_rows(
    tiny_backbone: Backbone, pipeline: Any, tmp_path: Path, layout: Any, num_vectors: int
) -> None:
    """Those without a placeholder token under the one that it is told."""
    embedding = replace(an_embedding(tiny_backbone, num_vectors), adapter=None)
    own = diffusers_files(embedding)["clip_l"][1]
    data = own if layout == "diffusers" else dump_embedding(embedding, layout)
    (tmp_path / "learned_embeds.safetensors").write_bytes(data)
    pipeline.load_textual_inversion(str(tmp_path), **({} if layout == "diffusers" else {"token": WORD}))
    torch.testing.assert_close(their_states(pipeline), our_states(tiny_backbone, embedding), rtol=0, atol=2e-6)


@pytest.mark.parametrize("write", [dump_kohya, dump_diffusers_lora])
def test_diffusers_reads_both_layouts_of_loras(
    tiny_backbone: Backbone, pipeline: Any, tmp_path: Path, write: Any
) -> None:
    embedding = an_embedding(tiny_backbone)
    (tmp_path / "learned_embeds.safetensors").write_bytes(diffusers_files(embedding)["clip_l"][1])
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(write(embedding))
    pipeline.load_textual_inversion(str(tmp_path))
    without = their_states(pipeline)
    pipeline.load_lora_weights(str(tmp_path))
    states = their_states(pipeline)
    assert (states - without).abs().max() > 0.05
    torch.testing.assert_close(states, our_states(tiny_backbone, embedding), rtol=0, atol=5e-6)


def test_peft_reads_its_folder(tiny_backbone: Backbone, pipeline: Any, tmp_path: Path) -> None:
    embedding = an_embedding(tiny_backbone)
    for name, data in (*peft_files(embedding).items(), *diffusers_files(embedding).values()):
        (tmp_path / name).write_bytes(data)
    pipeline.load_textual_inversion(str(tmp_path))
    pipeline.text_encoder = peft.PeftModel.from_pretrained(pipeline.text_encoder, tmp_path)
    torch.testing.assert_close(their_states(pipeline), our_states(tiny_backbone, embedding), rtol=0, atol=5e-6)


def test_a_pair_is_loaded_into_two_text_encoders(pipeline: Any, tmp_path: Path) -> None:
    """As diffusers documents it for SDXL: a call for each encoder, with the tensor of its file."""
    pair = LearnedEmbedding(
        placeholder_token=WORD,
        vectors={"clip_l": torch.ones(2, DIM), "clip_g": torch.full((2, 16), 0.5)},
    )
    for name, data in diffusers_files(pair).values():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "web.safetensors").write_bytes(dump_embedding(pair, WEBUI))
    web = load_file(tmp_path / "web.safetensors")
    second = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pipeline.tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for encoder, name, key in (
        (pipeline.text_encoder, "learned_embeds.safetensors", "clip_l"),
        (second, "learned_embeds_2.safetensors", "clip_g"),
    ):
        tokenizer = type(pipeline.tokenizer).from_pretrained(pipeline.tokenizer.name_or_path)
        ((token, rows),) = load_file(tmp_path / name).items()
        assert token == WORD
        assert torch.equal(rows, web[key])
        pipeline.load_textual_inversion(rows, token=WORD, tokenizer=tokenizer, text_encoder=encoder)
        ids = tokenizer.convert_tokens_to_ids([WORD, f"{WORD}_1"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], rows)
