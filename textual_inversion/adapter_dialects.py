"""Write a concept's adapter as the files of other tools, and read them back: tensors and bytes, no paths.

| function | keys of a layer | read by |
|---|---|---|
| `dump_kohya` | `lora_te_<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha` | kohya-ss/sd-scripts, web UIs |
| `dump_diffusers_lora` | `text_encoder.<layer>.lora_A.weight`, `.lora_B.weight` | diffusers, `load_lora_weights` |
| `peft_files` | `base_model.model.<layer>.lora_A.weight`, `.lora_B.weight` | PEFT, `PeftModel.from_pretrained` |

Only a plain LoRA of CLIP text encoders can be written (`check_plain`): any other adapter would be taken for one, and
draw something else. With several text encoders the layers' prefixes are `lora_te1`, `lora_te2` and `text_encoder`,
`text_encoder_2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from textual_inversion.adapter_config import CROSS_ATTENTION
from textual_inversion.adapter_formats import ENCODERS, dump_adapter
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.formats import from_bytes, to_bytes
from textual_inversion.lora import last_part

_MODULE = "text_model."
_HEADER = "lora_adapter_metadata"
"""Header entry from which diffusers makes PEFT's LoraConfig."""
_PEFT_MODEL = "base_model.model."

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"(?:lora_te(?P<number>\d?)_|text_encoder(?P<second>_2)?\.|base_model\.model\.)(?:text_model[._])?(?P<layer>.+?)\."
    r"(?P<half>lora_down|lora_up|lora_A|lora_B|alpha)(?:\.weight)?"
)
"""Key of a tensor in a file of this module."""
_HALVES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", "alpha": "alpha"}

Layers = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a layer -> (down [rank, in], up [out, rank])."""


def check_plain(embedding: LearnedEmbedding) -> LearnedAdapter:
    """Return the adapter of an embedding. Raises ValueError, with a remedy, if it is no plain LoRA of CLIPs."""
    adapter = embedding.adapter
    if adapter is None:
        raise ValueError(f"embedding {embedding.placeholder_token!r} was learned without an adapter")
    has_cross_attention = any(last_part(name) == CROSS_ATTENTION for name in adapter.tensors)
    if adapter.kind != "lora" or has_cross_attention:
        where = "cross-attention" if has_cross_attention else "text"
        raise ValueError(
            f"it was learned with an adapter of kind {adapter.kind!r} ({where}), which acts from the placeholder token "
            "on: other tools would take it for a LoRA and draw something else. Learn the concept with an adapter of "
            "kind 'lora' (recipe textboost-v1) or with none, or draw it with pipeline.use, or in diffusers with "
            "textual_inversion.diffusers_pipeline.load_into_pipeline"
        )
    unknown = sorted(embedding.vectors.keys() - {*ENCODERS, "t5xxl"})
    if unknown or any(encoder not in ENCODERS for encoder in layers_by_encoder(embedding)):
        raise ValueError(
            f"its adapter is one of the text encoder {unknown[0] if unknown else 't5xxl'!r}; other tools load adapters "
            f"of {' and '.join(ENCODERS)}"
        )
    return adapter


def layers_by_encoder(embedding: LearnedEmbedding) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Group the adapter's layers by text encoder: key -> name of a layer, without the encoder's key -> (down, up)."""
    assert embedding.adapter is not None
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, (down, up) in embedding.adapter.tensors.items():
        first, _, rest = name.partition(".")
        key, layer = (first, rest) if first in embedding.vectors else (next(iter(embedding.vectors)), name)
        found.setdefault(key, {})[layer] = (_plain(down), _plain(up))
    return found


def dump_kohya(embedding: LearnedEmbedding) -> bytes:
    """Return the adapter as a file with kohya's keys and an alpha for each layer. Raises ValueError as `check_plain`
    does."""
    adapter = check_plain(embedding)
    tensors: dict[str, Tensor] = {}
    for key, layers in layers_by_encoder(embedding).items():
        number = "" if len(embedding.vectors) == 1 else str(list(ENCODERS).index(key) + 1)
        for name, (down, up) in layers.items():
            path = f"lora_te{number}_{(_MODULE + name).replace('.', '_')}"
            alpha = torch.tensor(adapter.scale * len(down))
            tensors |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up, f"{path}.alpha": alpha}
    return to_bytes(tensors, _metadata(embedding))


def dump_diffusers_lora(embedding: LearnedEmbedding) -> bytes:
    """Return the adapter as the file that a pipeline's `load_lora_weights` reads, which is its own. Raises ValueError
    as `check_plain` does."""
    check_plain(embedding)
    return dump_adapter(embedding)


def peft_files(embedding: LearnedEmbedding) -> dict[str, bytes]:
    """Return the adapter as PEFT's folders, one for each text encoder: path of a file -> content.

    A model with one text encoder has no folder in the paths. Each tensor is there under two keys, as CLIP's outer
    module has gone with transformers 5, and PEFT only warns of keys that it does not find. Raises ValueError as
    `check_plain` does.
    """
    adapter = check_plain(embedding)
    files = {}
    for key, layers in layers_by_encoder(embedding).items():
        folder = "" if len(embedding.vectors) == 1 else f"{ENCODERS[key]}/"
        tensors: dict[str, Tensor] = {}
        for name, (down, up) in layers.items():
            for path in (f"{_PEFT_MODEL}{name}", f"{_PEFT_MODEL}{_MODULE}{name}"):
                tensors |= {f"{path}.lora_A.weight": down.clone(), f"{path}.lora_B.weight": up.clone()}
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "bias": "none",
            "lora_dropout": 0.0,
            **_peft_settings(adapter, layers),
        }
        files[folder + PEFT_CONFIG] = json.dumps(config, indent=1, sort_keys=True).encode()
        files[folder + PEFT_WEIGHTS] = to_bytes(tensors, {"format": "pt"})
    return files


def check_lora(data: bytes, embedding: LearnedEmbedding, encoder: str = "") -> None:
    """Raise ValueError unless a file of this module, read back, holds the adapter's tensors and its alphas.

    `encoder`: key of the text encoder whose PEFT folder has the file; that folder's alpha is in its configuration.
    """
    adapter = check_plain(embedding)
    tensors, header = from_bytes(data)
    settings = json.loads(header.get(_HEADER, "{}"))
    found: dict[tuple[str, str, str], Tensor] = {}
    for path, tensor in tensors.items():
        match = _KEY.fullmatch(path)
        if match is None:
            raise ValueError(f"{path!r} is not a key of a LoRA")
        key = encoder or ("clip_g" if match["number"] == "2" or match["second"] else "clip_l")
        layer = match["layer"].replace(".", "_")
        if not torch.equal(tensor, found.setdefault((key, layer, _HALVES[match["half"]]), tensor)):
            raise ValueError(f"{path!r} is there twice with different values")
        if f"{ENCODERS[key]}.lora_alpha" in settings:
            found[key, layer, "alpha"] = torch.tensor(settings[f"{ENCODERS[key]}.lora_alpha"])
    wanted: dict[tuple[str, str, str], Tensor] = {}
    for key, layers in layers_by_encoder(embedding).items():
        for name, (down, up) in layers.items() if encoder in ("", key) else ():
            layer = name.replace(".", "_")
            wanted |= {(key, layer, "down"): down, (key, layer, "up"): up}
            if not encoder:
                wanted[key, layer, "alpha"] = torch.tensor(adapter.scale * len(down))
    if found.keys() != wanted.keys() or not all(torch.equal(found[name], wanted[name]) for name in wanted):
        raise ValueError(f"the adapter of {embedding.placeholder_token!r} does not read back as it was written")


def _peft_settings(adapter: LearnedAdapter, layers: Layers) -> dict[str, object]:
    """Return PEFT's LoraConfig of the layers; it finds them by the end of their names."""
    rank = len(next(iter(layers.values()))[0])
    return {"r": rank, "lora_alpha": adapter.scale * rank, "target_modules": sorted(layers)}


def _metadata(embedding: LearnedEmbedding) -> dict[str, str]:
    """Return the header of a LoRA file: the embedding's provenance."""
    kept = {name: value for name, value in embedding.metadata.items() if name != "adapter"}
    return {**kept, "format": "pt", "placeholder_token": embedding.placeholder_token}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().contiguous()
