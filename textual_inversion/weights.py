"""Loading of pretrained weights, whole or not at all.

diffusers and transformers fill weights that a checkpoint lacks with random numbers, leave out those that they do not
know, and warn. A renamed prefix is enough to make a text encoder random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAMED = 3
"""Names of each sort that an error lists."""

POSITION_IDS = r"(^|\.)position_ids$"
"""Consecutive numbers that older versions of transformers saved as a buffer."""


def load_pretrained(cls: Any, model: str, *, unused: Sequence[str] = (), **options: Any) -> Any:
    """Load a module by a class's `from_pretrained` (untyped), from safetensors alone, with all its weights.

    `unused`: patterns of names that may be in the checkpoint although the class has no use for them. `options`: handed
    on. Raises ValueError, naming the first ones, for weights that are missing, unknown or of another shape, and OSError
    without such files.
    """
    folder = options.get("subfolder", "")
    where = f"{model}/{folder}" if folder else model
    try:
        module, info = cls.from_pretrained(model, use_safetensors=True, output_loading_info=True, **options)
    except (ValueError, RuntimeError) as error:  # diffusers' and transformers' own ways to refuse another shape
        raise ValueError(f"the weights in {where!r} cannot be loaded as {cls.__name__}: {error}") from error
    problems = _problems(info, [POSITION_IDS, *unused])
    if problems:
        raise ValueError(
            f"the weights in {where!r} are not those of a {type(module).__name__}: {problems}; without them the model "
            "would be partly random: save the checkpoint again from the library that reads it"
        )
    return module


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
