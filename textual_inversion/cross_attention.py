"""TextBoost++: text states of its own for each cross-attention layer of the denoiser, different for each prompt.

Park et al. 2026 (arXiv 2409.08248 v2), section 4.3: the text encoder runs once and gives H; layer l makes its keys and
values of H_l = H + Diag(m) A_l(H) (Eq. 8, 9), where A_l is a low-rank map and m the causal mask of the text encoder's
adapters. A_l(H) has two factors, m A_down(H) and A_up, which are made where prompts are encoded and travel in the
`Conditioning`: gradients reach the adapters through it, and a prompt that is drawn often is encoded once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from textual_inversion.adapter_config import CROSS_ATTENTION
from textual_inversion.conditioning import LayerChanges
from textual_inversion.lora import AdapterBatch

_KEYWORD = "layer_changes"
"""Key of the changes among the `cross_attention_kwargs` that diffusers hands from the U-Net down to its blocks."""


def layer_changes(
    layers: Sequence[str], hidden: Tensor, adapters: Sequence[AdapterBatch], encoder: str
) -> LayerChanges | None:
    """Return the changes that the adapters of a batch of prompts make to the states of each cross-attention layer.

    `layers`: names of all the denoiser's layers, in order. `hidden`: [batch, length, dim], the states H. `encoder`: key
    of the text encoder that made them. A prompt without an adapter, and the positions where an adapter does not act,
    are unchanged. Returns None if no adapter changes any of the layers.
    """
    changes = [
        _changes_of(batch, layers, hidden, encoder)
        for batch in adapters
        if any(name in batch.tensors for name in layers)
    ]
    if not changes:
        return None
    return LayerChanges(
        weights=torch.cat([weights for weights, _ in changes], dim=1),
        directions=torch.cat([directions for _, directions in changes], dim=1),
    )


def _changes_of(batch: AdapterBatch, layers: Sequence[str], hidden: Tensor, encoder: str) -> tuple[Tensor, Tensor]:
    """Return the weights [batch, rank, layers, length] and directions [batch, rank, layers, dim] of one batch."""
    down, up = _stacked(batch, layers)
    used = batch.concept.clamp(min=0)
    is_adapted = batch.concept >= 0
    acts = batch.positions[encoder].bool() & is_adapted[:, None]
    _, *rank_and_layers, dim = down.shape
    inner = torch.bmm(down[used].reshape(len(used), -1, dim), hidden.mT) * batch.scale[used, None, None]
    weights = inner.reshape(len(used), *rank_and_layers, -1)
    directions = torch.where(is_adapted[:, None, None, None], up[used], 0)
    return torch.where(acts[:, None, None, :], weights, 0), directions


def _stacked(batch: AdapterBatch, layers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Stack the tensors of all layers, [concepts, rank, layers, dim] each; a layer without any has zeros."""
    some_down, some_up = next(batch.tensors[name] for name in layers if name in batch.tensors)
    nothing = (torch.zeros_like(some_down), torch.zeros_like(some_up))
    pairs = [batch.tensors.get(name, nothing) for name in layers]
    return torch.stack([down for down, _ in pairs], dim=2), torch.stack([up.mT for _, up in pairs], dim=2)


class CrossAttentionLayers:
    """The cross-attention layers of a diffusers U-Net, each of which can be given text states of its own.

    Nothing is kept between calls, and a call without changes computes what the U-Net did before.
    """

    def __init__(self, unet: nn.Module) -> None:
        """Hook into the U-Net's transformer blocks, in order of execution; weights and names stay as they are."""
        self.layers: dict[str, tuple[int, int]] = {}
        """Name of each layer -> (width of its states, the same again), as in `Backbone.adapter_layers`."""
        for path, block in transformer_blocks(unet):
            width = block.attn2.to_k.in_features
            names = tuple(inspect.signature(block.forward).parameters)
            block.register_forward_pre_hook(partial(_take_own_states, len(self.layers), names), with_kwargs=True)
            self.layers[f"unet.{path}.{CROSS_ATTENTION}"] = (width, width)

    def changes(self, hidden: Tensor, adapters: Sequence[AdapterBatch], encoder: str) -> LayerChanges | None:
        """Return `layer_changes` of these layers."""
        return layer_changes(list(self.layers), hidden, adapters, encoder)

    @staticmethod
    def keywords(changes: LayerChanges | None) -> dict[str, Any]:
        """Return the keyword arguments that hand changes to a call of the U-Net; none without changes."""
        return {} if changes is None else {"cross_attention_kwargs": {_KEYWORD: changes}}


def transformer_blocks(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of each block with cross-attention, in order of execution."""
    for part in ("down_blocks", "mid_block", "up_blocks"):
        blocks = getattr(unet, part, None) or nn.Module()
        for path, module in blocks.named_modules(prefix=part):
            if getattr(module, "attn2", None) is not None:
                yield path, module


def _take_own_states(
    layer: int, names: tuple[str, ...], _block: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the text states that a transformer block is called with by those of its layer, if there are changes.

    `names`: the block's parameters, in order: with gradient checkpointing diffusers gives all by position.
    """
    given = {**dict(zip(names, args, strict=False)), **keywords}
    others = dict(given.get("cross_attention_kwargs") or {})
    changes = others.pop(_KEYWORD, None)
    if changes is None:
        return None
    states = changes.states(given["encoder_hidden_states"], layer)
    return (), {**given, "encoder_hidden_states": states, "cross_attention_kwargs": others}
