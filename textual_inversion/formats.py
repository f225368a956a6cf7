"""LearnedEmbedding <-> the file that diffusers' `load_textual_inversion` reads: tensors, header and bytes, no paths.

The file (`learned_embeds.safetensors`) has one key, the placeholder token, with a [num_vectors, dim] tensor; also
AUTOMATIC1111, ComfyUI and kohya read it, under its file name. Provenance is in the safetensors header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from textual_inversion.concept import LearnedEmbedding

ADAPTER_FILE = "adapter.safetensors"
"""Beside the embedding's file, if it was learned with an adapter; the header of the embedding's file then names it."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def to_diffusers(embedding: LearnedEmbedding) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One-key tensors and header metadata. Raises ValueError if there is more than one text encoder's rows, which
    one such file cannot hold, or if they are not finite."""
    if len(embedding.vectors) != 1:
        raise ValueError(
            f"embedding {embedding.placeholder_token!r} has rows for {sorted(embedding.vectors)}; a diffusers file "
            "holds those of exactly one text encoder"
        )
    ((key, rows),) = embedding.vectors.items()
    rows = _checked(rows, embedding.placeholder_token)
    norms = ", ".join(f"{norm:.4f}" for norm in rows.norm(dim=1).tolist())
    metadata = {
        **{name: value for name, value in embedding.metadata.items() if name != "adapter"},
        **({"adapter": ADAPTER_FILE} if embedding.adapter else {}),
        "format": "pt",
        "placeholder_token": embedding.placeholder_token,
        "text_encoder": key,
        "num_vectors": str(len(rows)),
        "norm": norms,
    }
    return {embedding.placeholder_token: rows}, metadata


def from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LearnedEmbedding:
    """The embedding in a diffusers file's tensors, ours or another tool's; [dim] counts as one vector. Without its
    adapter, which has a file of its own: see `adapter_formats.with_adapter`.

    Raises ValueError unless there is exactly one key with finite floating-point rows.
    """
    if len(tensors) != 1:
        raise ValueError(
            f"found the keys {sorted(tensors)}; a diffusers embedding has exactly one, the placeholder token"
        )
    ((token, rows),) = tensors.items()
    known = dict(metadata or {})
    return LearnedEmbedding(
        placeholder_token=token,
        vectors={known.get("text_encoder", "clip_l"): _checked(rows, token)},
        metadata=known,
    )


def dump_diffusers(embedding: LearnedEmbedding) -> bytes:
    """The content of `learned_embeds.safetensors`; the same embedding gives the same bytes."""
    return to_bytes(*to_diffusers(embedding))


def parse_diffusers(data: bytes) -> LearnedEmbedding:
    """Read what `dump_diffusers`, diffusers or another tool wrote. Raises ValueError for anything else."""
    return from_diffusers(*from_bytes(data))


def check_written(data: bytes, embedding: LearnedEmbedding) -> None:
    """Read a file back and compare: raises ValueError unless it holds exactly these rows under this token."""
    found = parse_diffusers(data)
    same = (
        found.placeholder_token == embedding.placeholder_token
        and found.vectors.keys() == embedding.vectors.keys()
        and all(torch.equal(rows, embedding.vectors[key].float()) for key, rows in found.vectors.items())
    )
    if not same:
        raise ValueError(
            f"the stored file of {embedding.placeholder_token!r} does not read back as it was written (it holds "
            f"{found.placeholder_token!r}); write it again"
        )


def _checked(rows: Tensor, token: str) -> Tensor:
    """[num_vectors, dim] float32 on the CPU, contiguous."""
    if not token or any(c.isspace() for c in token) or token == "__metadata__":
        raise ValueError(f"placeholder token {token!r} must be one word without spaces")
    if rows.dtype not in FLOATS:
        raise ValueError(f"embedding {token!r} has dtype {rows.dtype}; floating-point rows are needed")
    if rows.ndim not in (1, 2) or not rows.numel():
        raise ValueError(f"embedding {token!r} has shape {list(rows.shape)}; it must be [num_vectors, dim] or [dim]")
    if not rows.isfinite().all():
        raise ValueError(f"embedding {token!r} has values that are not finite; it cannot be used")
    return rows.detach().cpu().float().reshape(-1, rows.shape[-1]).contiguous()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its header sorted: the library writes metadata in an order that changes by the call."""
    data = save(dict(tensors), metadata=dict(metadata))
    header, rest = _split(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + rest


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError for anything else."""
    try:
        tensors = load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error}); it was cut short or is of another format") from error
    return tensors, _split(data)[0].get("__metadata__", {})


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's JSON header, which the library gives only for a path, and the tensors after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]
