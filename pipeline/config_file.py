"""Read a run's configuration from TOML text, `a.b=c` overrides and values of the command line."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import RunConfig
from pipeline.report_config import hidden_webhook

_ADAPTER = TypeAdapter(RunConfig)

RECIPES = Path(__file__).resolve().parent / "recipes"
"""Folder of the recipes: methods as TOML files, each naming the paper it follows."""


def recipe(name: str) -> str:
    """Return the path of the recipe with this bare name, or the argument itself if it is an address or a file.

    Raises ValueError for a bare name that is neither.
    """
    if "/" in name or "." in name or Path(name).is_file():
        return name
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"--config {name!r}: no such file, and the recipes are {', '.join(known)}")
    return str(RECIPES / f"{name}.toml")


def load_config(
    toml: str = "", overrides: Iterable[str] = (), *, base: Mapping[str, Any] | None = None, **values: object
) -> RunConfig:
    """Build a run's configuration from TOML text, then `a.b=c` overrides, then keyword values that are not None.

    All of these change `base`, a tree of values as `to_tree` returns it. Raises ValueError naming the key, the value
    and what is allowed.
    """
    try:
        tree = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the configuration is not valid TOML: {error}") from error
    tree = _merge(copy.deepcopy(base or {}), tree)
    for override in overrides:
        _apply_override(tree, override)
    _use_encoder(tree)
    tree |= {key: value for key, value in values.items() if value is not None}
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Convert a tree of plain values, as TOML or JSON hold them, to a RunConfig; missing keys get defaults.

    Raises ValueError with one line for each error.
    """
    try:
        return _ADAPTER.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(detail) for detail in error.errors())) from error


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Convert a RunConfig to a tree of plain values, which `parse_config` converts back."""
    return dataclasses.asdict(config)


def shown_tree(config: RunConfig) -> dict[str, Any]:
    """Return `to_tree`'s tree with the secret part of `report.webhook` hidden; other credentials are left to
    `redacted`."""
    tree = to_tree(config)
    tree["report"]["webhook"] = hidden_webhook(config.report.webhook)
    return tree


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base tree with its sections merged and its values replaced by the changes."""
    tree = dict(base)
    for name, value in changes.items():
        current = tree.get(name)
        is_section = isinstance(current, Mapping) and isinstance(value, Mapping)
        tree[name] = _merge(current, value) if is_section else value  # type: ignore[arg-type]
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set {override!r}: write it as key=value, for example --set inversion.steps=300")
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {override!r}: {name} is a value, not a section")
    tree[names[-1]] = _parse_value(text.strip())


def _use_encoder(tree: dict[str, Any]) -> None:
    """Make the encoder that the tree names the method of starts, unless the tree names a method."""
    match tree:
        case {"inversion": {"init": {"encoder": str(uri), **init}}} if uri and "method" not in init:
            tree["inversion"]["init"]["method"] = "encoder"


def _parse_value(text: str) -> object:
    """Parse a TOML value; a text that is none (a path, a model id) is returned as a string."""
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def _explain(detail: Any) -> str:
    """Return one line for one pydantic error."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(key, _known_keys(RunConfig), n=1, cutoff=0.5)
        return f"{key}: no such setting" + (f"; did you mean {close[0]}?" if close else "")
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key} = {detail['input']!r}: {detail['msg']}"


def _known_keys(config: type[Any], prefix: str = "") -> list[str]:
    keys = []
    for entry in dataclasses.fields(config):
        if dataclasses.is_dataclass(entry.default_factory):
            keys += _known_keys(entry.default_factory, f"{prefix}{entry.name}.")
        else:
            keys.append(f"{prefix}{entry.name}")
    return keys
