"""The setups that are compared, and what a row depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.encoder import BUDGETS, setups_of
from benchmarks.jobs import Job
from pipeline.config import RunConfig
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig

CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("a", "b"), initializer="cat")


@pytest.mark.parametrize("samples", BUDGETS)
def test_both_starts_learn_from_the_same_number_of_samples(samples: int) -> None:
    setups = setups_of(BUDGETS, 1, "e.safetensors")
    words, encoder = (setups[f"{start}-{samples}"].inversion(500, []) for start in ("words", "encoder"))
    assert encoder.steps * encoder.batch_size == samples
    assert encoder.init.method == "encoder"
    assert setups[f"words-{samples}"].concept(CONCEPT).images == ("a",)
    if samples:
        assert replace(encoder, init=words.init) == words
    else:
        assert setups["words-0"].drawn == "initializer"


def test_the_most_samples_are_the_projects_default() -> None:
    assert setups_of(BUDGETS, 4, "e")["words-2000"].inversion(500, []) == InversionConfig()


def test_a_row_is_measured_again_with_another_encoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    setup = setups_of([0], 4, str(path))["encoder-0"]
    config = replace(RunConfig(), inversion=setup.inversion(500, []))
    job = Job(name="encoder-0", setup=setup, concept=CONCEPT, config=config, shared="")
    path.write_bytes(b"one")
    before = job.key()
    path.write_bytes(b"another")
    assert job.key() != before
