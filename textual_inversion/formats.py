"""Convert a LearnedEmbedding to and from the file that diffusers' `load_textual_inversion` reads: tensors, header and
bytes, no paths.

The file (`learned_embeds.safetensors`) of a model with one text encoder has one key, the placeholder token, with a
[num_vectors, dim] tensor. AUTOMATIC1111, ComfyUI and kohya read it, too, and call the embedding by the file's name.
With several text encoders the keys are theirs (`clip_l`, `clip_g`, ...), as these tools have it for SDXL, and the token
is in the header alone; diffusers loads the tensor of one encoder at a time. Provenance is in the safetensors header.
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
from textual_inversion.errors import first_line
from textual_inversion.prompts import name_in_prompt

ADAPTER_FILE = "adapter.safetensors"
"""Name of the adapter's file, which lies beside the embedding's file and is named in that file's header."""

_PROMPT_AS = "prompt_as"
"""Header entry with the text that names the concept in prompts, where that is more than the placeholder token."""

SEVERAL = "text_encoders"
"""Header entry with the keys of several text encoders."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types of number that are read from files."""


def to_diffusers(embedding: LearnedEmbedding) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header metadata. Raises ValueError for rows that are not finite, or for none."""
    token = embedding.placeholder_token
    vectors = {key: checked_rows(rows, token) for key, rows in embedding.vectors.items()}
    if not vectors:
        raise ValueError(f"embedding {token!r} has no rows")
    norms = {key: ", ".join(f"{norm:.4f}" for norm in rows.norm(dim=1).tolist()) for key, rows in vectors.items()}
    metadata = {
        **{name: value for name, value in embedding.metadata.items() if name not in ("adapter", _PROMPT_AS)},
        **({_PROMPT_AS: name_in_prompt(token, embedding.class_noun)} if embedding.class_noun else {}),
        **({"adapter": ADAPTER_FILE} if embedding.adapter else {}),
        "format": "pt",
        "placeholder_token": token,
        "num_vectors": str(embedding.num_vectors),
    }
    if len(vectors) == 1:
        ((key, rows),) = vectors.items()
        return {token: rows}, {**metadata, "text_encoder": key, "norm": norms[key]}
    several = {SEVERAL: ", ".join(vectors), "norm": "; ".join(f"{key}: {norm}" for key, norm in norms.items())}
    return vectors, metadata | several


def from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LearnedEmbedding:
    """Return the embedding that a file's tensors hold; [dim] counts as one vector.

    A file with one key may be of any tool; one of several text encoders needs our header, as its keys are theirs and
    not the placeholder token. The adapter has a file of its own: see `adapter_formats.with_adapter`. Raises ValueError
    for other keys and for rows that are not finite floating-point numbers.
    """
    header = dict(metadata or {})
    if SEVERAL in header and sorted(tensors) == sorted(header[SEVERAL].split(", ")):
        token = header.get("placeholder_token", "")
        vectors = {key: checked_rows(tensors[key], token) for key in header[SEVERAL].split(", ")}
    elif len(tensors) == 1:
        ((token, rows),) = tensors.items()
        vectors = {header.get("text_encoder", "clip_l"): checked_rows(rows, token)}
    else:
        raise ValueError(
            f"found the keys {sorted(tensors)}; a diffusers embedding has exactly one, the placeholder token, or those "
            f"of the text encoders that its header names in {SEVERAL!r}"
        )
    noun = class_noun_of(header, token)
    return LearnedEmbedding(placeholder_token=token, vectors=vectors, class_noun=noun, metadata=header)


def class_noun_of(header: Mapping[str, str], token: str) -> str:
    """Return the noun that follows the placeholder token in prompts, from a file's header; empty if it names none.

    `token`: the file's placeholder token, where the header has none.
    """
    return header.get(_PROMPT_AS, "").partition(f"{header.get('placeholder_token', token)} ")[2]


def dump_diffusers(embedding: LearnedEmbedding) -> bytes:
    """Return the content of `learned_embeds.safetensors`; the same embedding gives the same bytes."""
    return to_bytes(*to_diffusers(embedding))


def parse_diffusers(data: bytes) -> LearnedEmbedding:
    """Read a file that `dump_diffusers`, diffusers or another tool wrote. Raises ValueError for any other content."""
    return from_diffusers(*from_bytes(data))


def check_written(data: bytes, embedding: LearnedEmbedding) -> None:
    """Raise ValueError unless a stored file, read back, holds exactly the embedding's rows under its token."""
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


def checked_rows(rows: Tensor, token: str) -> Tensor:
    """Return the rows as a contiguous [num_vectors, dim] float32 tensor on the CPU. Raises ValueError if unusable."""
    if not token or any(c.isspace() for c in token) or token == "__metadata__":
        raise ValueError(f"placeholder token {token!r} must be one word without spaces; give the concept such a word")
    if rows.dtype not in FLOATS:
        raise ValueError(f"embedding {token!r} has dtype {rows.dtype}; floating-point rows are needed")
    if rows.ndim not in (1, 2) or not rows.numel():
        raise ValueError(f"embedding {token!r} has shape {list(rows.shape)}; it must be [num_vectors, dim] or [dim]")
    if not rows.isfinite().all():
        raise ValueError(f"embedding {token!r} has values that are not finite; it cannot be used")
    return rows.detach().cpu().float().reshape(-1, rows.shape[-1]).contiguous()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write a safetensors file with a sorted header; the library alone orders metadata differently at every call."""
    data = save(dict(tensors), metadata=dict(metadata))
    header, rest = _split(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + rest


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a safetensors file. Raises ValueError for any other content."""
    try:
        tensors = load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"not a safetensors file ({first_line(error)}); it was cut short or is of another format"
        ) from error
    return tensors, _split(data)[0].get("__metadata__", {})


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its JSON header and its tensors; the library reads headers of paths alone."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]
