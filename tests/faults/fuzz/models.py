"""Models with files deleted, renamed, swapped, cut short or edited: refused by name, or loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from hypothesis import strategies as st

from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, JSON_DAMAGE, ByteDamage, JsonDamage, damaged
from tests.faults.fuzz.outcomes import Undocumented, refusal_of
from textual_inversion.families import load_backbone, load_vocabularies
from textual_inversion.model_files import model_hash

WAYS = ("delete", "empty", "rename", "swap", "copy", "folder", "pointer", "link to itself", "bytes", "json")
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@dataclass(frozen=True, slots=True)
class FileDamage:
    """One change of a model's file. Files count modulo their number, in the order of their names."""

    way: str
    file: int
    other: int
    of_bytes: ByteDamage
    of_json: JsonDamage


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A model as it is drawn: one of the tiny models by name, and its damages."""

    model: str
    damages: tuple[FileDamage, ...]


_DAMAGE = st.builds(
    FileDamage, way=st.sampled_from((*WAYS, "bytes", "json", "json", "json")), file=st.integers(0, 60),
    other=st.integers(0, 60), of_bytes=BYTE_DAMAGE, of_json=JSON_DAMAGE,
)  # fmt: skip


def model_area(folder: Path, models: Mapping[str, Path], *, loads: bool) -> Area:
    """Return the area of models, given as name -> directory or file. `loads`: also load what the checks accept."""
    numbers = count()

    def check(case: ModelCase) -> str:
        root = folder / str(next(numbers))
        model = _copy(models[case.model], root)
        try:
            for damage in case.damages:
                _inflict(damage, root)
            return _outcome(model, loads=loads)
        finally:
            shutil.rmtree(root)

    cases = st.builds(
        ModelCase, model=st.sampled_from(sorted(models)), damages=st.lists(_DAMAGE, min_size=1, max_size=2).map(tuple)
    )
    return Area("models", cases, check)


def _copy(model: Path, root: Path) -> Path:
    """Copy a model by links, which every damage replaces; return its place."""
    if model.is_file():
        root.mkdir()
        return Path(shutil.copyfile(model, root / model.name))
    return Path(shutil.copytree(model, root / "model", copy_function=os.link))


def _inflict(damage: FileDamage, root: Path) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if damage.way == "json":
        files = [path for path in files if path.suffix == ".json"] or files
    if not files:
        return
    path, other = files[damage.file % len(files)], files[damage.other % len(files)]
    content, others = path.read_bytes(), other.read_bytes()
    path.unlink()
    match damage.way:
        case "rename":
            path.with_name(f"_{path.name}").write_bytes(content)
        case "swap" if path != other:
            other.unlink()
            path.write_bytes(others)
            other.write_bytes(content)
        case "copy":
            path.write_bytes(others)
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path.name)
        case "delete":
            return
        case _:
            path.write_bytes(_contents(damage, content, others))


def _contents(damage: FileDamage, content: bytes, others: bytes) -> bytes:
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "pointer": lambda: _POINTER,
        "bytes": lambda: damaged(content, [damage.of_bytes], others),
        "json": lambda: damage.of_json.apply(content),
    }
    return ways.get(damage.way, lambda: content)()


def _outcome(model: Path, *, loads: bool) -> str:
    for step, refuse in (("the check", load_vocabularies), ("the digest", model_hash)):
        if said := refusal_of(partial(refuse, str(model))):
            return _named(model, said, f"refused by {step}")
    if not loads:
        return "accepted by the check"
    said = refusal_of(lambda: load_backbone(str(model), device="cpu", precision="float32"))
    return _named(model, said, "refused by the loading") if said else "loaded"


def _named(model: Path, said: str, outcome: str) -> str:
    if model.name not in said:
        raise Undocumented(f"the refusal does not name the model: {said[:300]}")
    return outcome
