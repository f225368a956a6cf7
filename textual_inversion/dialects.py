"""Convert embeddings to and from the files of other tools: tensors and bytes, no paths.

| layout | text encoders | keys | read by |
|---|---|---|---|
| `WEBUI` | one | `emb_params` | AUTOMATIC1111, Forge, SD.Next, ComfyUI, InvokeAI, kohya-ss/sd-scripts |
| `WEBUI` | several | `clip_l`, `clip_g`, `t5xxl` | the same tools, as far as they know the model |
| `ONETRAINER` | one | `emp_params` | OneTrainer |
| `ONETRAINER` | several | `clip_l`, `clip_g`, `t5` | OneTrainer |

All but diffusers call the embedding by the file's name. diffusers' own file is in `formats`; for a model with several
text encoders it takes a file for each (`diffusers_files`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from textual_inversion.adapter_formats import ENCODERS
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.errors import first_line
from textual_inversion.formats import (
    SEVERAL,
    checked_rows,
    class_noun_of,
    from_bytes,
    from_diffusers,
    to_bytes,
    to_diffusers,
)

Layout = Literal["webui", "onetrainer"]
WEBUI: Layout = "webui"
ONETRAINER: Layout = "onetrainer"

_ONLY_KEYS: Mapping[Layout, str] = {"webui": "emb_params", "onetrainer": "emp_params"}
"""Key of the rows of a model with one text encoder."""
_T5_KEYS: Mapping[Layout, str] = {"webui": "t5xxl", "onetrainer": "t5"}
"""Key of the rows of a T5; ComfyUI and OneTrainer differ."""
_T5 = "t5xxl"
"""Key of a T5 in `LearnedEmbedding.vectors`."""
_KNOWN_ENCODERS = (*ENCODERS, _T5)

_NAMELESS_KEYS = frozenset({*_ONLY_KEYS.values(), "*"})
"""Keys of single tensors that stand in place of a placeholder token; the file's name is the token."""
_OUTPUTS = re.compile(r"(?:emp_params|clip_l|clip_g|t5|llama|gemma\w*|qwen\w*)_out")
_LORA = re.compile(
    r"[._]lora_?(?:A|B|up|down|mid)(?:\.\w+)?\.weight$|\.lora_linear_layer\.|[._]lora\.(?:up|down)\.weight$"
    r"|\.(?:alpha|dora_scale|diff|diff_b)$|\.(?:hada|lokr|oft|ia3)_\w+$"
)
_OWN_ADAPTER = re.compile(r"(?:\.(?:causal|cross_attention)|^t5xxl\..*)\.(?:down|up)\.weight$")
_WEIGHTS = re.compile(r"\.(?:weight|bias|running_mean|gamma|beta)$")
_SHOWN_KEYS = 4


def dump_embedding(embedding: LearnedEmbedding, layout: Layout) -> bytes:
    """Return an embedding as a file of a layout; the same embedding gives the same bytes.

    Raises ValueError for rows that are not finite, and for a text encoder that the tools of the layout do not know.
    """
    check_known_encoders(embedding)
    found, metadata = to_diffusers(embedding)
    if embedding.vectors.keys() == {"clip_l"}:
        ((_, rows),) = found.items()
        return to_bytes({_ONLY_KEYS[layout]: rows}, metadata)
    if len(found) == 1:
        found = dict(zip(embedding.vectors, found.values(), strict=True))
    metadata.pop(SEVERAL, None)
    return to_bytes({_T5_KEYS[layout] if key == _T5 else key: rows for key, rows in found.items()}, metadata)


def diffusers_files(embedding: LearnedEmbedding) -> dict[str, tuple[str, bytes]]:
    """Return the files that `load_textual_inversion` takes, one for each text encoder: key -> (file name, content).

    The names are those of diffusers' training scripts, `learned_embeds.safetensors`, `learned_embeds_2.safetensors`,
    ..., in the order of the model's text encoders. Raises ValueError as `dump_embedding` does.
    """
    keys = list(embedding.vectors)
    if len(keys) > 1:
        check_known_encoders(embedding)
        keys = sorted(keys, key=_KNOWN_ENCODERS.index)
    return {
        key: (
            f"learned_embeds{f'_{number}' if number > 1 else ''}.safetensors",
            to_bytes(*to_diffusers(replace(embedding, vectors={key: embedding.vectors[key]}))),
        )
        for number, key in enumerate(keys, 1)
    }


def check_known_encoders(embedding: LearnedEmbedding) -> None:
    """Raise ValueError unless other tools know the embedding's text encoders."""
    unknown = sorted(embedding.vectors.keys() - set(_KNOWN_ENCODERS))
    if unknown:
        raise ValueError(
            f"no tool here reads rows of the text encoder {unknown[0]!r}; known are {', '.join(_KNOWN_ENCODERS)}"
        )


def parse_embedding(data: bytes, name: str) -> LearnedEmbedding:
    """Read an embedding of any layout that this project knows; how the file is called does not matter.

    The layouts are those of this module, diffusers' single key ([dim] or [num_vectors, dim], any floating-point type),
    the same in a file of PyTorch, and AUTOMATIC1111's `string_to_param`. Files of PyTorch are opened by its loader of
    plain tensors alone, which runs no code of the file.

    `name`: placeholder token of a file that has none, such as its name without the ending.
    Raises ValueError for any other content, and says what it is where that can be told.
    """
    if not data:
        raise ValueError("the file is empty")
    tensors, header = _open_torch(data) if _is_torch_file(data) else from_bytes(data)
    _refuse_others(tensors)
    if SEVERAL in header:
        return from_diffusers(tensors, header)
    vectors = {_T5 if key == "t5" else key: rows for key, rows in tensors.items()}
    if vectors and vectors.keys() <= set(_KNOWN_ENCODERS) and len(vectors) == len(tensors):
        return _of_encoders(vectors, name, header)
    if len(tensors) == 1:
        ((key, rows),) = tensors.items()
        return from_diffusers({name if key in _NAMELESS_KEYS else key: rows}, header)
    raise ValueError(_describe_several(tensors))


def check_embedding(data: bytes, embedding: LearnedEmbedding) -> None:
    """Raise ValueError unless a file, read back, holds exactly the embedding's rows."""
    found = parse_embedding(data, embedding.placeholder_token)
    same = found.vectors.keys() == embedding.vectors.keys() and all(
        torch.equal(rows, checked_rows(embedding.vectors[key], found.placeholder_token))
        for key, rows in found.vectors.items()
    )
    if not same:
        raise ValueError(f"the file of {embedding.placeholder_token!r} does not read back as it was written")


def _of_encoders(vectors: Mapping[str, Tensor], name: str, header: Mapping[str, str]) -> LearnedEmbedding:
    """Return the embedding of rows under their text encoders' keys. Raises ValueError for unequal numbers of rows."""
    rows = {key: checked_rows(each, name) for key, each in vectors.items()}
    numbers = {key: len(each) for key, each in rows.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(f"it has {numbers} rows; each text encoder needs equally many")
    noun = class_noun_of(header, name)
    return LearnedEmbedding(placeholder_token=name, vectors=rows, class_noun=noun, metadata=header)


def _is_torch_file(data: bytes) -> bool:
    """Return whether a file is one of `torch.save`, a zip archive or, from long ago, a bare pickle. A safetensors file
    may begin with the same bytes, but its ninth begins a JSON object."""
    return data[8:9] != b"{" and (data[:4] == b"PK\x03\x04" or data[:1] == b"\x80")


def _open_torch(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file of PyTorch, and the texts that AUTOMATIC1111 keeps beside them.

    Raises ValueError if it holds anything but plain tensors, numbers, texts, lists and dictionaries.
    """
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # on files that are damaged, or hold other objects, it raises nearly everything
        reason = first_line(error)
        raise ValueError(
            "it is a file of PyTorch that holds more than tensors, or is damaged, and opening it otherwise could run "
            f"code; in a tool that you trust it with, save it as .safetensors ({reason})"
        ) from error
    if isinstance(content, Tensor):
        return {"*": content}, {}
    if not isinstance(content, dict):
        raise ValueError(f"it is a file of PyTorch with a {type(content).__name__}, and not with an embedding")
    if "string_to_param" in content:
        return _open_string_to_param(content)
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise ValueError(f"it is a file of PyTorch with {_listed(others)}, which is no tensor, and no embedding")
    return {str(key): value for key, value in content.items()}, {}


def _open_string_to_param(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the rows of an AUTOMATIC1111 embedding; its name is the file's, as in that tool."""
    rows = content["string_to_param"]
    if not isinstance(rows, dict) or len(rows) != 1 or not isinstance(next(iter(rows.values())), Tensor):
        found = _listed([str(key) for key in rows]) if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"its string_to_param holds {found}, and not one embedding; save each in a file of its own")
    kept = {name: str(content[name]) for name in ("step", "sd_checkpoint_name") if content.get(name) is not None}
    return {"*": next(iter(rows.values()))}, kept


def _refuse_others(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with a remedy, for files of tensors that are often taken for embeddings."""
    keys = sorted(tensors)
    if outputs := [key for key in keys if _OUTPUTS.fullmatch(key)]:
        raise ValueError(
            f"{outputs[0]!r} is an output embedding of OneTrainer, which takes the place of the text encoder's states "
            "and not of a word's vectors; train it there with 'output embedding' off"
        )
    if any(_OWN_ADAPTER.search(key) for key in keys):
        raise ValueError("it is the adapter of a concept; give the learned_embeds.safetensors that lies beside it")
    if any(key.startswith("bundle_emb.") for key in keys):
        raise ValueError("it is a LoRA with embeddings in it; save the embedding as a file of its own")
    if any(_LORA.search(key) for key in keys):
        raise ValueError(
            f"it is a LoRA or another adapter ({len(keys)} tensors such as {keys[0]!r}) and not an embedding; load it "
            "as a LoRA"
        )
    if any(_WEIGHTS.search(key) for key in keys):
        kind = (
            "a checkpoint" if any(key.startswith("model.diffusion_model.") for key in keys) else "a network's weights"
        )
        raise ValueError(f"it is {kind} ({len(keys)} tensors such as {keys[0]!r}) and not an embedding")


def _describe_several(tensors: Mapping[str, Tensor]) -> str:
    """Return the reason why a file with none or several tensors is refused."""
    keys = sorted(tensors)
    is_flat = all(rows.ndim in (1, 2) for rows in tensors.values())
    if len(keys) > 1 and is_flat and len({rows.shape[-1] for rows in tensors.values()}) == 1:
        return f"it holds {len(keys)} embeddings ({_listed(keys)}); save each in a file of its own"
    return (
        f"found the keys {_listed(keys)}; an embedding has one key, the placeholder token, "
        f"{' or '.join(sorted(_NAMELESS_KEYS))}, or those of the text encoders ({', '.join(_KNOWN_ENCODERS)})"
    )


def _listed(keys: list[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_SHOWN_KEYS]) or "none"
    return shown + (f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else "")
