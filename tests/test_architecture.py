"""docs/ARCHITECTURE.md names what is there: every module, every layer, every step of the walks."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_TEXT = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
_WALKS = re.findall(r"^### ([^\n]*)\n\n((?: +\d+  [^\n]*\n)+)", _TEXT, re.MULTILINE)
_HOP = re.compile(r" +(\d+)  (\S+) +([\w.]+)  ")


def _modules() -> set[str]:
    """Return the paths of all modules that hold something."""
    found = (path for name in ("pipeline", "textual_inversion") for path in (ROOT / name).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in found if path.read_text().strip()}


def test_every_module_has_one_line() -> None:
    named = re.findall(r"^\| `((?:pipeline|textual_inversion)/[\w/]+\.py)` \| \S.*\|$", _TEXT, re.MULTILINE)
    assert sorted(_modules() - {*named}) == [], "modules without a line in docs/ARCHITECTURE.md"
    assert sorted({*named} - _modules()) == [], "lines of modules that are gone"
    assert len(named) == len(_modules()), "a module with two lines"


def _layers(container: str) -> list[list[str]]:
    """Return the layers of a package's contract, from the top down, each with its members."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [container])
    return [re.findall(r"\w+", layer) for layer in layers]


def test_every_layer_of_the_pipeline_is_drawn() -> None:
    """The drawing names the members of each layer, in the contract's order."""
    drawing = _TEXT.partition("## Rooms")[2].partition("Below them all")[0]
    drawn = re.findall(r"\w+", " ".join(re.findall(r"^ {4}(.*)$", drawing, re.MULTILINE)))
    places = [[drawn.index(name) for name in layer] for layer in _layers("pipeline")]
    assert all(max(above) < min(below) for above, below in pairwise(places))


def test_layers_of_the_core_are_in_order() -> None:
    drawing = _TEXT.partition("Below them all")[2].partition("## ")[0]
    layer_of = {name: number for number, layer in enumerate(_layers("textual_inversion")) for name in layer}
    lines = [re.findall(r"\w+", line) for line in re.findall(r"^ {4}(.*)$", drawing, re.MULTILINE)]
    numbers = [layer_of[line[0]] for line in lines]
    assert numbers == sorted(set(numbers))
    listed = [(line[0], name) for line in lines for name in line[1:] if name in layer_of and name != "engine"]
    assert [(first, name) for first, name in listed if layer_of[name] != layer_of[first]] == []


def test_there_are_five_walks() -> None:
    assert len(_WALKS) == 5


@pytest.mark.parametrize(("title", "walk"), _WALKS, ids=[title for title, _ in _WALKS])
def test_walks_name_what_exists(title: str, walk: str) -> None:
    """Each hop is numbered, enters another file than the one before, and names something that this file defines."""
    hops = [_HOP.match(line) for line in walk.splitlines()]
    assert None not in hops
    found = [hop.groups() for hop in hops if hop]
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1))
    assert all(file != following for (_, file, _), (_, following, _) in pairwise(found))
    for _, file, name in found:
        path = ROOT / (file.replace("ti/", "textual_inversion/", 1) if file.startswith("ti/") else f"pipeline/{file}")
        assert path.is_file(), f"{title}: {file}"
        defined = re.search(rf"^ *(?:async )?(?:def|class) {name}\b", path.read_text(), re.MULTILINE)
        assert defined, f"{title}: {file} defines no {name}"
