"""The adapter file: what goes in comes out, in diffusers' keys, and everything else is refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from textual_inversion.adapter_formats import dump_adapter, from_peft, parse_adapter, to_peft, with_adapter
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.formats import ADAPTER_FILE, dump_diffusers, from_bytes, parse_diffusers

Q, FC2 = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc2"
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.cross_attention"
A, B = f"text_encoder.text_model.{FC2}.lora_A.weight", f"text_encoder.text_model.{FC2}.lora_B.weight"

CAUSAL_DOWN, CAUSAL_UP = (f"text_encoder.text_model.{FC2}.causal.{half}.weight" for half in ("down", "up"))


def an_embedding(kind: Any = "lora", scale: float = 0.3, **changes: tuple[Tensor, Tensor]) -> LearnedEmbedding:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {Q: (draw(2, 4), draw(4, 2)), FC2: (draw(2, 8), draw(4, 2))} | changes
    return LearnedEmbedding(
        placeholder_token="<cat-toy>",
        vectors={"clip_l": torch.ones(1, 4)},
        adapter=LearnedAdapter(kind=kind, scale=scale, tensors=tensors),
        metadata={"step": "250"},
    )


def test_cross_attention_has_keys_of_its_own() -> None:
    """TextBoost++, with and without layers of the text encoder."""
    generator = torch.Generator().manual_seed(1)
    own = {CROSS: (torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator))}
    both = an_embedding("causal", **own)
    assert both.adapter is not None
    alone = replace(both, adapter=replace(both.adapter, tensors=own))
    for embedding, names in ((both, {Q, FC2, CROSS}), (alone, {CROSS})):
        data = dump_adapter(embedding)
        assert {f"{CROSS}.down.weight", f"{CROSS}.up.weight"} <= load(data).keys()
        found = parse_adapter(data)
        assert (found.kind, found.scale, found.tensors.keys()) == ("causal", 0.3, names)
        assert torch.equal(found.tensors[CROSS][0], own[CROSS][0])
        assert torch.equal(found.tensors[CROSS][1], own[CROSS][1])


@pytest.mark.parametrize("kind", ["lora", "causal"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: Any) -> None:
    embedding = an_embedding(kind)
    assert embedding.adapter is not None
    data = dump_adapter(embedding)
    found = parse_adapter(data)
    assert (found.kind, found.scale) == (kind, 0.3)
    assert found.tensors.keys() == {Q, FC2}
    for name, (down, up) in embedding.adapter.tensors.items():
        assert torch.equal(found.tensors[name][0], down)
        assert torch.equal(found.tensors[name][1], up)

    (tmp_path / "a.safetensors").write_bytes(data)
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    down, up = (A, B) if kind == "lora" else (CAUSAL_DOWN, CAUSAL_UP)
    assert (len(shapes), shapes[down], shapes[up]) == (4, [2, 8], [4, 2])
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["kind"], metadata["rank"], metadata["scale"]) == (kind, "2", "0.3")
    assert (metadata["step"], metadata["placeholder_token"]) == ("250", "<cat-toy>")
    assert ("plain LoRA loader" in metadata.get("note", "")) == (kind == "causal")


def test_no_loader_takes_a_causal_adapter_for_a_lora() -> None:
    """ComfyUI loads any file by the keys that it knows and only names the others in its log."""
    data = dump_adapter(an_embedding("causal"))
    assert not [key for key in load(data) if "lora" in key or ".down.weight" in key.replace(".causal.down.weight", "")]
    assert "lora_adapter_metadata" not in from_bytes(data)[1]


def test_causal_adapters_of_earlier_releases_are_read() -> None:
    """They had the keys of a LoRA, and an entry in the header that made diffusers refuse them."""
    tensors, header = to_peft(an_embedding("lora"))
    found = parse_adapter(save(tensors, metadata={**header, "kind": "causal"}))
    assert (found.kind, found.scale, found.tensors.keys()) == ("causal", 0.3, {Q, FC2})
    assert dump_adapter(replace(an_embedding("lora"), adapter=found)) == dump_adapter(an_embedding("causal"))


def test_equal_adapters_give_equal_bytes() -> None:
    turned = an_embedding()
    assert turned.adapter is not None
    backwards = {name: (down.mT.contiguous().mT, up) for name, (down, up) in reversed(turned.adapter.tensors.items())}
    other = LearnedEmbedding(
        placeholder_token="<cat-toy>",
        vectors={},
        adapter=LearnedAdapter(kind="lora", scale=0.3, tensors=backwards),
        metadata={"step": "250"},
    )
    assert {dump_adapter(other) for _ in range(5)} == {dump_adapter(an_embedding())}


def test_a_file_that_diffusers_saved_is_read() -> None:
    """Half precision; alpha and rank in diffusers' own header entry, or nowhere."""
    tensors = {key.replace("text_model.", ""): t.half() for key, t in to_peft(an_embedding())[0].items()}
    saved_by_diffusers = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 6})}
    found = parse_adapter(save(tensors, metadata=saved_by_diffusers))
    assert (found.kind, found.scale) == ("lora", 3.0)
    assert found.tensors.keys() == {Q, FC2}
    assert found.tensors[Q][0].dtype == torch.float32
    assert parse_adapter(save(tensors)).scale == 1.0


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({A: torch.ones(2, 8)}, {}, rf"'{FC2}' has only lora_A; the file is not whole"),
        ({A: torch.ones(2, 8), B: torch.ones(4, 3)}, {}, r"shapes \[2, 8\] and \[4, 3\]; they must be"),
        ({A: torch.ones(8), B: torch.ones(4, 1)}, {}, r"shapes \[8\] and \[4, 1\]"),
        ({A: torch.ones(1, 8).int(), B: torch.ones(4, 1)}, {}, "dtype torch.int32"),
        ({A: torch.full((1, 8), torch.inf), B: torch.ones(4, 1)}, {}, "not finite"),
        ({"unet.down.lora_A.weight": torch.ones(1, 8)}, {}, r"'unet.down.lora_A.weight' is not one of a text encoder"),
        ({f"{CROSS}.up.weight": torch.ones(8, 1)}, {}, r"cross_attention' has only up; the file is not whole"),
        ({f"{CROSS}.lora_A.weight": torch.ones(1, 8)}, {}, r"cross_attention.lora_A.weight' is not one of a text enc"),
        ({"text_encoder.x.alpha": torch.ones(1)}, {}, r"'text_encoder.x.alpha' is not one"),
        ({A: torch.ones(1, 8), B: torch.ones(4, 1)}, {"kind": "hypernet"}, "kind 'hypernet'; known are 'lora', 'causa"),
        ({A: torch.ones(1, 8), B: torch.ones(4, 1)}, {"scale": "much"}, "no readable scale"),
        ({A: torch.ones(1, 8), B: torch.ones(4, 1)}, {"scale": "nan"}, "scale is nan"),
    ],
)
def test_anything_else_is_refused(tensors: dict[str, Tensor], metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_peft(tensors, metadata)
    with pytest.raises(ValueError, match=message):
        parse_adapter(save(tensors, metadata=metadata))


def test_an_embedding_says_whether_it_comes_with_an_adapter() -> None:
    embedding = an_embedding("causal")
    beside = {ADAPTER_FILE: dump_adapter(embedding)}
    found = with_adapter(parse_diffusers(dump_diffusers(embedding)), beside.__getitem__)
    assert found.adapter is not None
    assert embedding.adapter is not None
    assert found.adapter.kind == "causal"
    assert torch.equal(found.adapter.tensors[FC2][1], embedding.adapter.tensors[FC2][1])

    plain = parse_diffusers(dump_diffusers(replace(found, adapter=None)))
    assert "adapter" not in plain.metadata
    assert with_adapter(plain, beside.__getitem__) is plain


def test_a_file_that_is_empty_or_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="changes no layer"):
        from_peft({})
    with pytest.raises(ValueError, match="not a safetensors file"):
        parse_adapter(dump_adapter(an_embedding())[:-1])


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="'<x>' was learned without an adapter"):
        dump_adapter(LearnedEmbedding(placeholder_token="<x>", vectors={"clip_l": torch.ones(1, 2)}))
    with pytest.raises(ValueError, match="not finite"):
        dump_adapter(an_embedding(fc2=(torch.full((2, 8), torch.nan), torch.ones(4, 2))))
    with pytest.raises(ValueError, match=r"ranks \[1, 2\]; one rank for all"):
        dump_adapter(an_embedding(fc2=(torch.ones(1, 8), torch.ones(4, 1))))
