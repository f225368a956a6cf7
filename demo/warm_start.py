"""Start a training of a larger world from the weights of a smaller one.

A new vocabulary keeps the rows of the words that it shares with the old one, and a deeper U-Net starts as exactly the
function that the shallower one was.
"""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer


@torch.no_grad()
def transfer_rows(rows: Tensor, old: CLIPTokenizer, new: CLIPTokenizer) -> Tensor:
    """Return the token table of the new vocabulary, [tokens, width].

    A token that the old vocabulary holds keeps its row; any other starts at the mean of the rows into which the old
    tokenizer splits its text.
    """
    known = old.get_vocab()
    table = torch.empty(len(new), rows.shape[1])
    for token, index in new.get_vocab().items():
        if token in known:
            table[index] = rows[known[token]]
        else:
            table[index] = rows[_pieces(token, old)].mean(0)
    return table


def _pieces(token: str, tokenizer: CLIPTokenizer) -> list[int]:
    ids = tokenizer(token.removesuffix("</w>"), add_special_tokens=False).input_ids
    return ids or [tokenizer.unk_token_id]


@torch.no_grad()
def transfer_text_encoder(encoder: CLIPTextModel, old: CLIPTokenizer, new: CLIPTokenizer) -> CLIPTextModel:
    """Return the text encoder for the new vocabulary and its `model_max_length`, in fp32.

    Positions beyond the old length start at the last old position's vector.
    """
    state = encoder.state_dict()
    config = copy.deepcopy(encoder.config)
    config.update(_sizes(new))
    target = CLIPTextModel(config)
    target.load_state_dict(_transferred(state, old, new))
    return target.float()


@torch.no_grad()
def transfer_clip(clip: CLIPModel, old: CLIPTokenizer, new: CLIPTokenizer) -> CLIPModel:
    """Return the CLIP for the new vocabulary and its `model_max_length`, in fp32."""
    config = copy.deepcopy(clip.config)
    config.text_config.update(_sizes(new))
    target = CLIPModel(config)
    target.load_state_dict(_transferred(clip.state_dict(), old, new))
    return target.float()


def _sizes(tokenizer: CLIPTokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _transferred(state: dict[str, Tensor], old: CLIPTokenizer, new: CLIPTokenizer) -> dict[str, Tensor]:
    """Return the state with a new token table and with positions for the new length."""
    result = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    (tokens,) = (key for key in state if key.endswith("token_embedding.weight"))
    result[tokens] = transfer_rows(result[tokens], old, new)
    (positions,) = (key for key in state if key.endswith("embeddings.position_embedding.weight") and _is_text(key))
    known = result[positions]
    added = new.model_max_length - len(known)
    result[positions] = torch.cat([known, known[-1:].expand(max(0, added), -1)])[: new.model_max_length]
    return {key: value for key, value in result.items() if not key.endswith("position_ids")}


def _is_text(key: str) -> bool:
    return not key.startswith("vision_model.")


@torch.no_grad()
def grow_unet(old: UNet2DConditionModel, new: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the old U-Net's weights into a deeper `new` one and return it.

    The layers that the old one lacks must be residual branches that start at zero, so the function stays the same.
    Raises ValueError for a weight of the old U-Net that has no place in the new one, or one of another shape.
    """
    state = new.state_dict()
    for key, value in old.state_dict().items():
        if key not in state or state[key].shape != value.shape:
            raise ValueError(f"{key} of shape {tuple(value.shape)} does not fit the new U-Net")
        state[key] = value.float()
    new.load_state_dict(state)
    return new
