"""Some hundred cases of `python -m tests.faults.fuzz`, always the same ones: each ends in a documented outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.fuzz.artefacts import artefact_area
from tests.faults.fuzz.campaign import Area, run_area
from tests.faults.fuzz.damage import ByteDamage, JsonDamage, with_right_checksums
from tests.faults.fuzz.embeddings import embedding_area
from tests.faults.fuzz.manifests import manifest_area
from tests.faults.fuzz.models import model_area
from tests.faults.fuzz.photos import photo_area, whole_files
from tests.faults.fuzz.prompts import prompt_area

SEED = 17
AREAS: dict[str, tuple[int, Callable[[Path, Path], Area]]] = {
    "photos": (150, lambda folder, _: photo_area(folder)),
    "manifests": (30, manifest_area),
    "prompts": (60, prompt_area),
    "models": (60, lambda folder, model: model_area(folder, {"sd": model}, loads=False)),
    "artefacts": (40, artefact_area),
    "embeddings": (60, lambda *_: embedding_area()),
}
"""Number of cases of each area, and the function that makes it from a folder and a tiny model."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep libraries from logging what each damaged file makes them say."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", AREAS)
def test_every_outcome_is_documented(name: str, tiny_model: Path, tmp_path: Path) -> None:
    num_cases, make = AREAS[name]
    report = run_area(make(tmp_path, tiny_model), num_cases, SEED, bounds=None)
    assert report.num_cases == num_cases
    assert not report.findings, "\n".join(f"{kind}\n{case}" for kind, case in report.findings.items())
    assert len(report.outcomes) > 1, "the cases reach one outcome alone"


def test_a_failure_is_found_and_the_other_cases_go_on() -> None:
    def check(value: int) -> str:
        if value % 2:
            raise KeyError(value)
        return "even"

    from hypothesis import strategies as st

    report = run_area(Area("numbers", st.integers(0, 1000), check), 50, SEED, bounds=None)
    assert list(report.findings) == ["KeyError in unknown place"]
    assert report.num_cases == 50
    assert report.outcomes["even"] > 5


def test_damage_changes_what_it_says() -> None:
    data = bytes(range(10))
    assert ByteDamage("cut", 4, 1, 0).apply(data) == data[:4]
    assert ByteDamage("flip", 2, 1, 255).apply(data) == bytes([0, 1, 253, *range(3, 10)])
    assert ByteDamage("delete", 2, 3, 0).apply(data) == bytes([0, 1, 5, 6, 7, 8, 9])
    assert ByteDamage("splice", 8, 1, 0).apply(data, b"abcdefghij") == data[:8] + b"ij"
    assert JsonDamage(at=1, is_deleted=True, value=None).apply(b'{"a": 1}') == b"{}"
    png = whole_files()["PNG RGB"]
    assert with_right_checksums(png) == png
    assert with_right_checksums(png[:29] + b"\0\0\0\0" + png[33:]) == png
