"""Convert a LearnedAdapter to and from its own file, which for a plain LoRA is the one that diffusers'
`load_lora_weights` reads: tensors, header and bytes, no paths. Files of other tools are in `adapter_dialects`.

The file (`adapter.safetensors`) lies beside `learned_embeds.safetensors`. A `lora` adapter (TextBoost v1) is a plain
LoRA, with the keys of PEFT in diffusers: `text_encoder.text_model.<layer>.lora_A.weight` [rank, in] and
`.lora_B.weight` [out, rank]; a second CLIP's begin with `text_encoder_2`, as in diffusers' pipelines of Stable
Diffusion XL and 3.

A `causal` adapter (v2, ++) is not: it acts only from the placeholder token on, which plain loaders do not support. Its
keys are its own, so that no loader takes it for a LoRA and draws something else in silence:
`text_encoder.text_model.<layer>.causal.down.weight` and `.up.weight`, and for what TextBoost++ changes in the
denoiser's cross-attention `unet.<block>.cross_attention.down.weight` [rank, dim] and `.up.weight` [dim, rank], where
`<block>` is the path of the transformer block in diffusers' U-Net. Files of earlier releases have the LoRA's keys and
are read as well. `diffusers_pipeline.load_into_pipeline` lets a pipeline of diffusers draw with it.

An adapter that changes a T5 is not, either, as plain loaders leave a T5 out. Its keys are `t5xxl.<layer>.down.weight`
and `.up.weight`, and of a `lora` one's CLIP `text_encoder.text_model.<layer>.down.weight` and `.up.weight`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from torch import Tensor

from textual_inversion.adapter_config import CROSS_ATTENTION
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.errors import first_line
from textual_inversion.formats import ADAPTER_FILE, FLOATS, SEVERAL, from_bytes, to_bytes
from textual_inversion.lora import last_part, layer_name

Kind = Literal["lora", "causal"]

_ENCODER = "text_encoder"
ENCODERS = {"clip_l": _ENCODER, "clip_g": f"{_ENCODER}_2"}
"""Text encoder key, with which the names of layers begin in a model of several -> the encoder's name in diffusers'
pipelines."""
_T5 = "t5xxl."
"""Start of the names of a T5's layers."""
_LORA_HALVES = ("lora_A", "lora_B")
_HALVES = ("down", "up")
"""Last parts of the keys of a layer's two tensors, before `.weight`: down, up."""
_CAUSAL = ".causal"
"""Mark between a layer's name and the halves of a causal adapter."""
_MODULE = "text_model."
"""Attribute of CLIPTextModel that holds the layers in older transformers; diffusers leaves it out with newer ones."""
_PEFT_KEY = "lora_adapter_metadata"
"""Header entry from which diffusers makes PEFT's LoraConfig."""
_CAUSAL_NOTE = (
    "acts only from the placeholder token on, padding excepted (TextBoost v2): a plain LoRA loader would change every "
    "position and draw other pictures"
)


def to_peft(embedding: LearnedEmbedding) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and header metadata for an embedding's adapter.

    Raises ValueError if the embedding has no adapter, or one that `_check_adapter` refuses.
    """
    adapter = embedding.adapter
    if adapter is None:
        raise ValueError(f"embedding {embedding.placeholder_token!r} was learned without an adapter")
    _check_adapter(adapter)
    tensors = {}
    for name, pair in adapter.tensors.items():
        for key, tensor in zip(_keys_of(name, adapter), pair, strict=True):
            tensors[key] = tensor.detach().cpu().float().contiguous()
    rank = len(next(iter(adapter.tensors.values()))[0])
    metadata = {
        **{name: value for name, value in embedding.metadata.items() if name != "adapter"},
        "format": "pt",
        "placeholder_token": embedding.placeholder_token,
        "kind": adapter.kind,
        "rank": str(rank),
        "scale": repr(adapter.scale),
    }
    if len(embedding.vectors) > 1:
        metadata[SEVERAL] = ", ".join(embedding.vectors)
    if adapter.kind == "causal":
        return tensors, metadata | {"note": _CAUSAL_NOTE}
    if changes_t5(adapter):
        return tensors, metadata
    return tensors, metadata | {_PEFT_KEY: json.dumps(_peft_settings(adapter, rank), sort_keys=True)}


def from_peft(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LearnedAdapter:
    """Return the adapter that a file's tensors hold, be the file written here or by diffusers.

    The scale is 1 where the header gives none. Raises ValueError for keys of another kind, a missing half, and tensors
    that are not finite or do not fit together.
    """
    header = dict(metadata or {})
    kind = header.get("kind", "lora")
    if kind not in get_args(Kind):
        raise ValueError(f"the adapter's header says kind {kind!r}; known are {', '.join(map(repr, get_args(Kind)))}")
    halves: dict[str, dict[str, Tensor]] = {}
    is_named = any(key in ENCODERS for key in header.get(SEVERAL, "").split(", "))
    has_several = is_named or any(key.startswith(f"{ENCODERS['clip_g']}.") for key in tensors)
    for key, tensor in tensors.items():
        name, half = _layer_of(key, has_several=has_several)
        halves.setdefault(name, {})[half] = tensor
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"layer {name!r} has only {next(iter(pair))}; the file is not whole")
    adapter = LearnedAdapter(
        kind=cast(Kind, kind),
        scale=_scale(header),
        tensors={name: (pair[down], pair[up]) for name, pair in halves.items() for down, up in [sorted(pair)]},
    )
    _check_adapter(adapter)
    return replace(adapter, tensors={name: (down.float(), up.float()) for name, (down, up) in adapter.tensors.items()})


def _peft_settings(adapter: LearnedAdapter, rank: int) -> dict[str, Any]:
    """Return the header entry from which diffusers makes PEFT's LoraConfig of each text encoder."""
    # PEFT matches target modules by the end of a layer's name, so these hold with and without the outer module
    layers: dict[str, list[str]] = {_ENCODER: []}
    for name in sorted(adapter.tensors):
        encoder, layer = _encoder_of(name)
        layers.setdefault(encoder, []).append(layer)
    settings: dict[str, Any] = {}
    for encoder, names in layers.items():
        own = {"r": rank, "lora_alpha": adapter.scale * rank, "target_modules": names}
        settings |= {f"{encoder}.{field}": value for field, value in own.items()}
    return settings


def changes_t5(adapter: LearnedAdapter) -> bool:
    """Return whether an adapter changes layers of a T5."""
    return any(name.startswith(_T5) for name in adapter.tensors)


def _keys_of(name: str, adapter: LearnedAdapter) -> tuple[str, str]:
    """Return the keys of a layer's tensors, down and up."""
    path, (down, up) = name, _HALVES
    if last_part(name) != CROSS_ATTENTION and not name.startswith(_T5):
        encoder, layer = _encoder_of(name)
        path = f"{encoder}.{_MODULE}{layer}"
        if adapter.kind == "causal":
            path += _CAUSAL
        elif not changes_t5(adapter):
            down, up = _LORA_HALVES
    return f"{path}.{down}.weight", f"{path}.{up}.weight"


def _encoder_of(name: str) -> tuple[str, str]:
    """Return the name in diffusers' pipelines of the text encoder that a linear layer belongs to, and the layer's name
    within it."""
    key, _, layer = name.partition(".")
    return (ENCODERS[key], layer) if key in ENCODERS else (_ENCODER, name)


def _layer_of(key: str, *, has_several: bool) -> tuple[str, str]:
    """Return the layer that a file's key belongs to, and which of its tensors it is ("lora_A", "down", ...).

    `has_several`: whether the file is of a model with several text encoders, whose layers' names begin with their keys.
    Names of halves are in alphabetic order, down before up. Raises ValueError for any other key.
    """
    path, _, half = key.removesuffix(".weight").rpartition(".")
    is_causal = path.endswith(_CAUSAL)
    encoder, _, layer = path.removesuffix(_CAUSAL).partition(".")
    if encoder in ENCODERS.values() and half in (_HALVES if is_causal else (*_HALVES, *_LORA_HALVES)):
        start = next(f"{own}." for own, name in ENCODERS.items() if name == encoder) if has_several else ""
        return start + layer_name(layer), half
    if (last_part(path) == CROSS_ATTENTION or path.startswith(_T5)) and half in _HALVES:
        return path, half
    raise ValueError(
        f"the key {key!r} is not one of a text encoder's LoRA ('{_ENCODER}.<layer>.lora_A.weight'), of a causal "
        f"adapter ('{_ENCODER}.<layer>{_CAUSAL}.down.weight') or of cross-attention ('<block>.{CROSS_ATTENTION}.down"
        ".weight')"
    )


def dump_adapter(embedding: LearnedEmbedding) -> bytes:
    """Return the content of `adapter.safetensors`; the same adapter gives the same bytes."""
    return to_bytes(*to_peft(embedding))


def parse_adapter(data: bytes) -> LearnedAdapter:
    """Read a file that `dump_adapter` or diffusers wrote. Raises ValueError for any other content."""
    return from_peft(*from_bytes(data))


def with_adapter(embedding: LearnedEmbedding, read: Callable[[str], bytes]) -> LearnedEmbedding:
    """Return a parsed embedding together with the adapter that its header names, or unchanged if it names none.

    Rows that were learned with an adapter draw other pictures without it. `read` returns the content of a file in the
    embedding's folder, given its name.
    """
    if embedding.metadata.get("adapter") != ADAPTER_FILE:
        return embedding
    return replace(embedding, adapter=parse_adapter(read(ADAPTER_FILE)))


def _scale(metadata: Mapping[str, str]) -> float:
    """Return alpha / rank, read from this project's header entry or from PEFT's. Raises ValueError if unreadable."""
    try:
        if "scale" in metadata:
            return float(metadata["scale"])
        peft: dict[str, Any] = json.loads(metadata.get(_PEFT_KEY, "{}"))
        rank = float(peft.get(f"{_ENCODER}.r", 1))
        return float(peft.get(f"{_ENCODER}.lora_alpha", rank)) / rank
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"the adapter's header has no readable scale: {first_line(error)}") from error


def _check_adapter(adapter: LearnedAdapter) -> None:
    """Raise ValueError for an adapter that is empty or has tensors that cannot be used."""
    if not adapter.tensors:
        raise ValueError("the adapter changes no layer")
    if not math.isfinite(adapter.scale):
        raise ValueError(f"the adapter's scale is {adapter.scale}; it cannot be used")
    ranks = {len(down) for down, _ in adapter.tensors.values()}
    if len(ranks) > 1:
        raise ValueError(f"the adapter's layers have ranks {sorted(ranks)}; one rank for all is needed")
    for name, (down, up) in adapter.tensors.items():
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel() or not up.numel():
            raise ValueError(
                f"layer {name!r} of the adapter has shapes {list(down.shape)} and {list(up.shape)}; they must be "
                "[rank, in] and [out, rank]"
            )
        for tensor in (down, up):
            if tensor.dtype not in FLOATS:
                raise ValueError(f"layer {name!r} of the adapter has dtype {tensor.dtype}; floating point is needed")
            if not tensor.isfinite().all():
                raise ValueError(f"layer {name!r} of the adapter has values that are not finite; it cannot be used")
