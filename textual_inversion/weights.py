"""Loading of pretrained weights, whole or not at all.

diffusers and transformers fill weights that a checkpoint lacks with random numbers, leave out those that they do not
know, and warn. A renamed prefix is enough to make a text encoder random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from textual_inversion.errors import first_line
from textual_inversion.single_file import belongs

_NAMED = 3
"""Names of each sort that an error lists."""

POSITION_IDS = r"(^|\.)position_ids$"
"""Consecutive numbers that older versions of transformers saved as a buffer."""


def load_pretrained(cls: Any, model: str, *, unused: Sequence[str] = (), **options: Any) -> Any:
    """Load a module by a class's `from_pretrained` (untyped), from safetensors alone, with all its weights.

    `unused`: patterns of names that may be in the checkpoint although the class has no use for them. `options`: handed
    on. Raises ValueError, naming the first ones, for weights that are missing, unknown, of another shape or not finite,
    and OSError without such files.
    """
    folder = options.get("subfolder", "")
    where = f"{model}/{folder}" if folder else model
    try:
        module, info = cls.from_pretrained(model, use_safetensors=True, output_loading_info=True, **options)
    except (ValueError, RuntimeError) as error:  # diffusers' and transformers' own ways to refuse another shape
        raise ValueError(f"the weights in {where!r} cannot be loaded as {cls.__name__}: {first_line(error)}") from error
    problems = _problems(info, [POSITION_IDS, *unused])
    if problems:
        raise ValueError(
            f"the weights in {where!r} are not those of a {type(module).__name__}: {problems}; without them the model "
            "would be partly random: save the checkpoint again from the library that reads it"
        )
    _check_finite(module, where)
    return module


def load_single_file(cls: Any, path: Path, component: str, directory: str, dtype: torch.dtype) -> Any:
    """Load a module of diffusers or transformers (untyped) from a checkpoint in one file, by diffusers' conversion.

    `component`: its name in the diffusers layout, and the folder of its configuration in `directory`. Raises ValueError
    for weights that are missing, unknown, of another shape or not finite.
    """
    where = f"{path} ({component})"
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if belongs(name, component)]  # noqa: SIM118
        weights = {name: _cast(file.get_tensor(name), dtype) for name in names}
    try:
        module, unexpected = _converted(cls, weights, component, directory)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"the weights in {where!r} cannot be loaded as {cls.__name__}: {first_line(error)}") from error
    missing = [name for name, each in module.state_dict().items() if each.is_meta]
    if problems := _problems({"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": []}, []):
        raise ValueError(f"the weights in {where!r} are not those of a {cls.__name__}: {problems}")
    _check_finite(module, where)
    return module.eval()


def _converted(cls: Any, weights: dict[str, Tensor], component: str, directory: str) -> tuple[Any, list[str]]:
    """Return a module with the weights that diffusers' conversion gives it, all others on the meta device, and the
    names of weights that it has no use for."""
    # takes seconds, and feature extractors need none of it
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    if cls.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:  # a text encoder of transformers
        options = {"config": directory, "subfolder": component, "local_files_only": True}
        return create_diffusers_clip_model_from_ldm(cls, weights, **options), []
    config = cls.load_config(directory, subfolder=component, local_files_only=True)
    with init_empty_weights():
        module = cls.from_config(config)
    convert = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    keys = module.load_state_dict(convert(checkpoint=weights, config=config), strict=False, assign=True)
    return module, keys.unexpected_keys


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor, unless its values are integers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_finite(module: Any, where: str) -> None:
    """Raise ValueError, naming the first ones, if weights are NaN or infinite."""
    weights = module.state_dict().items()
    broken = [name for name, each in weights if each.is_floating_point() and not each.isfinite().all()]
    if broken:
        raise ValueError(
            f"the weights in {where!r} have values that are NaN or infinite: {_some(broken)}; the training or merging "
            "that made them failed"
        )


def _problems(info: Mapping[str, Any], unused: Sequence[str]) -> str:
    """Describe what `output_loading_info` reports; empty if nothing is wrong."""
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    unexpected = [name for name in info["unexpected_keys"] if not any(re.search(each, name) for each in unused)]
    found = {"missing": info["missing_keys"], "unknown": unexpected, "of another shape": mismatched}
    parts = [f"{_some(names)} {verb}" for verb, names in found.items() if names]
    return "; ".join([*parts, *map(str, info.get("error_msgs") or [])])


def _some(names: Sequence[str]) -> str:
    """List the first names in alphabetic order, and say how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(map(repr, ordered[:_NAMED])) + more
