"""Read a run's configuration: TOML text, `a.b=c` overrides and values of the command line -> `RunConfig`."""

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

_ADAPTER = TypeAdapter(RunConfig)

RECIPES = Path(__file__).resolve().parent / "recipes"
"""Methods as TOML files, each with the paper it follows."""


def recipe(name: str) -> str:
    """Where a TOML is: of a bare name, the recipe that comes with the package; anything else is an address already."""
    if "/" in name or "." in name or Path(name).is_file():
        return name
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"--config {name!r}: no such file, and the recipes are {', '.join(known)}")
    return str(RECIPES / f"{name}.toml")


def load_config(
    toml: str = "", overrides: Iterable[str] = (), *, base: Mapping[str, Any] | None = None, **values: object
) -> RunConfig:
    """The configuration of a run: TOML text, then `a.b=c` overrides, then keyword values that are not None. `base`: a
    tree of values, as `to_tree` gives it, that all of these change.

    Raises ValueError naming the key, the value and what would be right.
    """
    try:
        tree = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the configuration is not valid TOML: {error}") from error
    tree = _merged(copy.deepcopy(base or {}), tree)
    for override in overrides:
        _apply(tree, override)
    tree |= {key: value for key, value in values.items() if value is not None}
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Check a tree of plain values, as TOML or JSON hold them, and make it a RunConfig; missing keys get defaults."""
    try:
        return _ADAPTER.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(detail) for detail in error.errors())) from error


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Plain nested values; `parse_config` takes them back unchanged."""
    return dataclasses.asdict(config)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, values replaced."""
    tree = dict(below)
    for name, value in above.items():
        before = tree.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        tree[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set {override!r}: write it as key=value, for example --set inversion.steps=300")
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {override!r}: {name} is a value, not a section")
    tree[names[-1]] = _parse_value(text.strip())


def _parse_value(text: str) -> object:
    """A TOML value; a bare word that is none (a path, a model id) is taken as a string."""
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def _explain(detail: Any) -> str:
    """One line for one pydantic error."""
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
