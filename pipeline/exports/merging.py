"""A model's text encoders with a concept's adapter merged into their weights, for tools that load no adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pipeline.exports.tools import Refused
from pipeline.inputs.models import locate, model_hash
from textual_inversion.adapter_dialects import check_plain, layers_by_encoder
from textual_inversion.adapter_formats import ENCODERS
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import to_bytes
from textual_inversion.lora import merged_state_dict
from textual_inversion.model_files import find_model_files


def merged_files(embedding: LearnedEmbedding) -> dict[str, bytes]:
    """Return the folders of the text encoders that the adapter changes, W0 + scale up down in the place of each W0:
    path -> content.

    The model is the one that the concept was learned on. Raises Refused if it is not here, has changed since, or if the
    adapter is no plain LoRA.
    """
    try:
        adapter = check_plain(embedding)
        files = find_model_files(locate(_model_of(embedding)))
        merged = {}
        for key, layers in layers_by_encoder(embedding).items():
            folder = ENCODERS[key]
            state = _read_state(files.directory, [name for name in files.names if name.startswith(f"{folder}/")])
            whole = merged_state_dict(state, replace(adapter, tensors=layers))
            merged[f"{folder}/config.json"] = (files.directory / folder / "config.json").read_bytes()
            merged[f"{folder}/model.safetensors"] = to_bytes(whole, {"format": "pt"})
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    return merged


def _model_of(embedding: LearnedEmbedding) -> str:
    """Return the model that the concept was learned on. Raises ValueError if its files are others now."""
    model = embedding.metadata.get("model", "")
    if not model:
        raise ValueError("its file does not say which model it was learned on")
    if model_hash(model) != embedding.metadata.get("model_hash"):
        raise ValueError(f"it was learned on another state of model {model!r} than {locate(model)} has now")
    return model


def _read_state(directory: Path, names: list[str]) -> dict[str, Tensor]:
    """Read a component's weights from all of its files."""
    state: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            state |= load_file(directory / name)
    return state
