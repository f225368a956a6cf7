"""Model families: a table of rows, each a diffusers pipeline class and the modules that serve it.

Importing this package loads no family and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from textual_inversion import model_files

if TYPE_CHECKING:
    from textual_inversion.families.base import Backbone
    from textual_inversion.prompts import Vocabularies


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table of families."""

    description: str
    """The models it serves, for messages."""
    module: str
    """Import path of a module with `load(files, *, device, precision) -> Backbone`."""
    vocabularies: str
    """Import path of a module, free of torch, with `load_vocabularies(directory) -> Vocabularies`."""


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        description="Stable Diffusion 1.x and 2.x",
        module="textual_inversion.families.sd",
        vocabularies="textual_inversion.tokenizer",
    ),
}
"""Diffusers pipeline class, as `model_index.json` names it -> the family that serves it."""


def load_backbone(model: str, *, device: str = "auto", precision: str = "auto") -> Backbone:
    """Load a frozen model from a diffusers directory or hub id, from safetensors only and without running its code.

    `device`: a torch device; `auto` is CUDA where there is one. `precision`: `float32`, `bfloat16` or `float16` of
    the denoiser; `auto` is bfloat16 on CUDA, float32 elsewhere. Raises ValueError for a model it cannot serve.
    """
    files = model_files.find_model_files(model)
    module = import_module(_family(model, files).module)
    backbone: Backbone = module.load(files, device=device, precision=precision)
    return backbone


def load_vocabularies(model: str) -> Vocabularies:
    """Read the vocabularies of a model alone, without torch. Raises ValueError if they cannot be read."""
    files = model_files.find_model_files(model)
    module = import_module(_family(model, files).vocabularies)
    vocabularies: Vocabularies = module.load_vocabularies(files.directory)
    return vocabularies


def _family(model: str, files: model_files.ModelFiles) -> Family:
    """Look a model's family up in the table. Raises ValueError, listing the families, if it has none."""
    if files.pipeline_class in FAMILIES:
        return FAMILIES[files.pipeline_class]
    known = "; ".join(f"{name} ({family.description})" for name, family in FAMILIES.items())
    raise ValueError(f"model {model!r} is a {files.pipeline_class}; families known here: {known}")
