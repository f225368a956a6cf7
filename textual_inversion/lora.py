"""Low-rank changes of a text encoder's linear layers, different for each prompt of a batch (TextBoost).

The layers' weights never change. Adapters are added to the layers' outputs for one call on one thread, so a grid can be
drawn with one concept's adapter while the engine learns others, and nothing is loaded or merged to switch concepts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from textual_inversion.adapter_config import ADAPTER_TARGETS, CROSS_ATTENTION, T5_TARGETS, AdapterShape
from textual_inversion.concept import LearnedAdapter
from textual_inversion.transfer import to_device

TARGETS = ADAPTER_TARGETS
"""Last parts of the names of a CLIP block's linear layers."""

_MADE_UP_STD = 0.02
"""Standard deviation of the up tensors of made-up adapters."""

_WRAPPER = "text_model."
"""Prefix of the names of CLIPTextModel's layers up to transformers 4; version 5 has dropped it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterBatch:
    """The adapters of several concepts, all of one rank and on the same layers, for a batch of prompts."""

    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Layer name -> (down [concepts, rank, in], up [concepts, out, rank]) float32, on the backbone's device."""

    concept: Tensor
    """Index of the concept whose adapter each prompt uses, [batch] integers; -1 for none."""

    scale: Tensor
    """Factor of each concept's change, alpha / rank, [concepts]."""

    positions: Mapping[str, Tensor]
    """Text encoder key -> [batch, length], true where the change is added; see `acting_positions`."""

    def change(self, encoder: str, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return y = W x + m scale up down x for a layer of a text encoder, given x [batch, length, in] and W x.

        The formula is TextBoost v2's causality-preserved adaptation; with m = 1 it is LoRA, as in v1. Where m is 0, or
        a prompt uses no adapter, the outputs are the layer's own to the bit.
        """
        if name not in self.tensors:
            return outputs
        down, up = self.tensors[name]
        used = self.concept.clamp(min=0)
        inner = torch.bmm(inputs, down[used].mT) * self.scale[used, None, None]
        changed = outputs + torch.bmm(inner, up[used].mT)
        acts = self.positions[encoder].bool() & (self.concept >= 0)[:, None]
        return torch.where(acts[..., None], changed, outputs)


class AdaptableLayers:
    """The linear layers of a text encoder, which add the changes of the adapters in use to their outputs."""

    def __init__(self, text_encoder: nn.Module, key: str, prefix: str = "") -> None:
        """Hook into the layers, which are found by the last part of their name; weights and names stay as they are.

        `key`: key of the text encoder. `prefix`: start of each layer's name here, by which the layers of a family's
        text encoders are distinguished.
        """
        self._key = key
        self._prefix = prefix
        self._in_use = threading.local()
        self.layers: dict[str, tuple[int, int]] = {}
        """Layer name -> (inputs, outputs)."""
        for path, module in text_encoder.named_modules():
            if isinstance(module, nn.Linear) and last_part(path) in (*TARGETS, *T5_TARGETS):
                name = prefix + layer_name(path)
                self.layers[name] = (module.in_features, module.out_features)
                module.register_forward_hook(partial(self._change, name))

    @contextmanager
    def using(self, adapters: Sequence[AdapterBatch]) -> Iterator[None]:
        """Let the layers add these changes, one after the other, within the block and on this thread.

        Changes of the denoiser's cross-attention are left to it. Raises ValueError if there are changes for another
        layer that the text encoder does not have.
        """
        named = {name for batch in adapters for name in batch.tensors if name.startswith(self._prefix)}
        unknown = sorted(name for name in named - self.layers.keys() if last_part(name) != CROSS_ATTENTION)
        if unknown:
            raise ValueError(f"the adapter changes {unknown[0]!r}, which this text encoder does not have")
        self._in_use.adapters = adapters
        try:
            yield
        finally:
            self._in_use.adapters = ()

    def _change(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        for batch in getattr(self._in_use, "adapters", ()):
            outputs = batch.change(self._key, name, inputs[0], outputs)
        return outputs


def layer_name(path: str) -> str:
    """Return a layer's name, the same in every version of transformers."""
    return path.removeprefix(_WRAPPER)


def acting_positions(kind: Literal["lora", "causal"], ids: Tensor, is_concept: Tensor, end_of_text: int) -> Tensor:
    """Return where a concept's adapter acts in prompts of these ids of one text encoder, [..., length] bool.

    `lora` (TextBoost v1): everywhere. `causal` (v2): m_i = 1 iff i >= i* and i is not padding, where i* is the first
    of the concept's positions, which `is_concept` [..., length] marks. The end of the text is the last position that
    is not padding: it sums up the prompt, and is changed. Positions before i* see only positions before it, so their
    states do not change; a prompt without the concept has no i* and does not change at all.
    """
    if kind == "lora":
        return torch.ones_like(ids, dtype=torch.bool)
    has_begun = is_concept.cumsum(-1) > 0
    is_end = ids == end_of_text
    is_padding = is_end.cumsum(-1) - is_end.int() > 0
    return has_begun & ~is_padding


def last_part(name: str) -> str:
    """Return the last part of a layer's name, which is the word that `adapter.targets` has for it."""
    return name.rpartition(".")[2]


ActingAdapter = tuple[LearnedAdapter, Mapping[str, Tensor]]
"""An adapter of a prompt, and the positions where it acts: text encoder key -> [length] bool."""


def group_adapters(adapters: Sequence[Sequence[ActingAdapter]], device: torch.device) -> list[AdapterBatch]:
    """Group the adapters that each prompt of a batch uses into batches of one shape each.

    A prompt's own adapters stay in their order, and no two of different rank or layers share a product: so what is
    computed for a prompt is the same whatever the others use.
    """
    alike: dict[tuple[object, ...], list[tuple[int, ActingAdapter]]] = {}
    for order in range(max(map(len, adapters), default=0)):
        for prompt, used in enumerate(adapters):
            if order < len(used):
                adapter, _ = used[order]
                shapes = sorted((name, len(down)) for name, (down, _) in adapter.tensors.items())
                alike.setdefault((order, *shapes), []).append((prompt, used[order]))
    return [_stack(group, len(adapters), device) for group in alike.values()]


def _stack(group: Sequence[tuple[int, ActingAdapter]], num_prompts: int, device: torch.device) -> AdapterBatch:
    """Stack (prompt, adapter and positions) of one shape, at most one a prompt."""
    distinct = list({id(adapter): adapter for _, (adapter, _) in group}.values())
    number = {id(adapter): i for i, adapter in enumerate(distinct)}
    concept = torch.full((num_prompts,), -1)
    positions = {key: torch.zeros(num_prompts, len(acts), dtype=torch.bool) for key, acts in group[0][1][1].items()}
    for prompt, (adapter, where) in group:
        concept[prompt] = number[id(adapter)]
        for key, acts in where.items():
            positions[key][prompt] = acts
    return AdapterBatch(
        tensors={
            name: (
                to_device(torch.stack([adapter.tensors[name][0] for adapter in distinct]), device),
                to_device(torch.stack([adapter.tensors[name][1] for adapter in distinct]), device),
            )
            for name in distinct[0].tensors
        },
        concept=to_device(concept, device),
        scale=to_device(torch.tensor([adapter.scale for adapter in distinct]), device),
        positions={key: to_device(acts, device) for key, acts in positions.items()},
    )


def initial_adapter(
    layers: Mapping[str, tuple[int, int]], targets: Sequence[str], rank: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw an adapter for the targeted layers: layer name -> (down [rank, in], up [out, rank]) float32 on the CPU.

    down is normal with deviation 1 / rank (TextBoost's "gaussian"); up is zero, so the adapter changes nothing before
    the first step.
    """
    return {
        name: (torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank))
        for name, (inputs, outputs) in layers.items()
        if last_part(name) in targets
    }


def made_up_adapter(
    layers: Mapping[str, tuple[int, int]], config: AdapterShape, generator: torch.Generator
) -> LearnedAdapter:
    """Draw an adapter of these settings, of a kind other than 'none', that changes something, to try a model with."""
    assert config.kind != "none"
    tensors = {
        name: (
            torch.randn(config.rank, inputs, generator=generator) / inputs**0.5,
            _MADE_UP_STD * torch.randn(outputs, config.rank, generator=generator),
        )
        for name, (inputs, outputs) in layers.items()
        if last_part(name) in config.targets
    }
    return LearnedAdapter(kind=config.kind, scale=config.alpha / config.rank, tensors=tensors)


def merged_state_dict(state: Mapping[str, Tensor], adapter: LearnedAdapter) -> dict[str, Tensor]:
    """Merge an adapter into a text encoder's state dict, W0 + scale up down, for tools that load no adapters.

    Raises ValueError for a causal adapter, which no change of the weights is equal to, and for another model's adapter.
    """
    if adapter.kind != "lora":
        raise ValueError(
            f"an adapter of kind {adapter.kind!r} acts at some positions only, so no weights are equal to it; only "
            "'lora' can be merged"
        )
    paths = {f"{layer_name(path).removesuffix('.weight')}": path for path in state if path.endswith(".weight")}
    merged = dict(state)
    for name, (down, up) in adapter.tensors.items():
        weight = state[paths[name]] if name in paths else None
        if weight is None or weight.shape != (len(up), down.shape[1]):
            raise ValueError(f"the text encoder has no layer {name!r} of shape {[len(up), down.shape[1]]}")
        merged[paths[name]] = (weight.float() + adapter.scale * (up @ down)).to(weight.dtype)
    return merged
