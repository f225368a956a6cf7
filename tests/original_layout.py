"""Checkpoints in one file, under the names of Stable Diffusion's original code, made from models in the diffusers
layout: the way back from what diffusers' `from_single_file` converts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


def save_in_one_file(model: Path, path: Path, **metadata: str) -> Path:
    """Save a Stable Diffusion 1 or XL model of the diffusers layout in one file, in its precision; returns the path."""
    weights = _unet(model) | _autoencoder(model)
    if (model / "text_encoder_2").is_dir():
        weights |= _clip(model, "text_encoder", "conditioner.embedders.0.transformer.text_model.")
        weights |= _open_clip(model, "text_encoder_2", "conditioner.embedders.1.model.")
    else:
        weights |= _clip(model, "text_encoder", "cond_stage_model.transformer.text_model.")
        # older files have these, which are no weights
        weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(3)[None]
    save_file({name: each.contiguous() for name, each in weights.items()}, path, metadata=metadata)
    return path


def _read(model: Path, component: str) -> Weights:
    (path,) = (model / component).glob("*.safetensors")
    return load_file(path)


def _unet(model: Path) -> Weights:
    config = json.loads((model / "unet/config.json").read_text())
    per_block = config["layers_per_block"] + 1
    layers = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    if config.get("addition_embed_type"):
        layers = {**layers, **DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]}
    weights = _read(model, "unet")
    with_attention = {name.rpartition(".attentions.")[0] for name in weights if ".attentions." in name}

    def renamed(name: str) -> str:
        if name in layers:
            return str(layers[name])
        side, block, kind, number, rest = _block(name)
        if side == "mid":
            return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * number}.{_resnet(rest)}"
        first = block * per_block
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            place = 1 + (f"up_blocks.{block}" in with_attention)
            return f"output_blocks.{first + per_block - 1}.{place}.{rest}"
        place = f"input_blocks.{1 + first + number}" if side == "down" else f"output_blocks.{first + number}"
        return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{_resnet(rest)}"

    return {f"model.diffusion_model.{renamed(name)}": each for name, each in weights.items()}


def _autoencoder(model: Path) -> Weights:
    layers = DIFFUSERS_TO_LDM_MAPPING["vae"]
    weights = _read(model, "vae")
    num_blocks = len(json.loads((model / "vae/config.json").read_text())["down_block_types"])

    def renamed(name: str) -> str:
        if name in layers:
            return str(layers[name])
        tower, _, inner = name.partition(".")
        side, block, kind, number, rest = _block(inner)
        if side == "mid" and kind == "attentions":
            return f"{tower}.mid.attn_1.{_replaced(rest, _VAE_ATTENTION)}"
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        if side == "mid":
            return f"{tower}.mid.block_{number + 1}.{rest}"
        level = f"{tower}.{side}.{block if side == 'down' else num_blocks - 1 - block}"
        return f"{level}.block.{number}.{rest}" if kind == "resnets" else f"{level}.{side}sample.{rest}"

    def shaped(name: str, tensor: Tensor) -> Tensor:
        is_linear = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        return tensor[..., None, None] if is_linear else tensor

    return {f"first_stage_model.{renamed(name)}": shaped(name, each) for name, each in weights.items()}


def _clip(model: Path, component: str, prefix: str) -> Weights:
    return {prefix + name.removeprefix("text_model."): each for name, each in _read(model, component).items()}


def _open_clip(model: Path, component: str, prefix: str) -> Weights:
    weights = {name.removeprefix("text_model."): each for name, each in _read(model, component).items()}
    renamed = {
        f"{prefix}token_embedding.weight": weights["embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": weights["embeddings.position_embedding.weight"],
        f"{prefix}ln_final.weight": weights["final_layer_norm.weight"],
        f"{prefix}ln_final.bias": weights["final_layer_norm.bias"],
        f"{prefix}text_projection": weights["text_projection.weight"].T,
        f"{prefix}logit_scale": torch.tensor(1.0),
    }
    for name in weights:
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
        if not match:
            continue
        layer, rest = f"{prefix}transformer.resblocks.{match[1]}", match[2]
        if joined := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
            parts = [weights[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            renamed[f"{layer}.attn.in_proj_{joined[1]}"] = torch.cat(parts)
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            renamed[f"{layer}.{_replaced(rest, _OPEN_CLIP)}"] = weights[name]
    return renamed


def _block(name: str) -> tuple[str, int, str, int, str]:
    """Split a name such as `down_blocks.0.resnets.1.conv1.weight`: side, block, kind of module, number, the rest."""
    match = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.*)", name)
    assert match, name
    return match[1], int(match[2] or 0), match[3], int(match[4]), match[5]


def _resnet(rest: str) -> str:
    return _replaced(rest, _RESNET)


def _replaced(rest: str, names: dict[str, str]) -> str:
    layer, _, kind = rest.rpartition(".")
    return f"{names[layer]}.{kind}"
