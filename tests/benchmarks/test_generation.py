"""The generation benchmark on a tiny model: both sides draw the same pictures, and the command says how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import generation
from benchmarks.generation import Drawing
from textual_inversion.config import SamplingConfig


def test_both_sides_draw_the_same_pictures(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = Drawing(str(tiny_model), "cpu", SamplingConfig(steps=2, batch_size=2), threads=1)
    drawn: dict[str, list[Any]] = {"ours": [], "theirs": []}
    generate, pipeline = generation.generate, drawing._plain

    def ours(*arguments: Any) -> Any:
        drawn["ours"] += generate(*arguments)

    def theirs(*arguments: Any, **options: Any) -> Any:
        drawn["theirs"] += pipeline(*arguments, **options).images

    monkeypatch.setattr(generation, "generate", ours)
    monkeypatch.setattr(drawing, "_plain", theirs)
    for several in (False, True):
        assert drawing.ours(several, batches=2) > 0
        assert drawing.theirs(several, batches=2) > 0
    assert len(drawn["ours"]) == 8
    for one, other in zip(drawn["ours"], drawn["theirs"], strict=True):
        assert abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_the_command(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch-sizes", "2", "--batches", "1", "--repetitions", "1", "--steps", "2"]
    assert generation.main(["--model", str(tiny_model), *small]) == 0
    said = capsys.readouterr().out
    assert "| 2 | every row another, ours |" in said
    assert "to load one concept more" in said


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_against_a_loop(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--stage", "48", "--rows-per-part", "16", "--repetitions", "1", "--steps", "2"]
    assert generation.main(["--model", str(tiny_model), *small]) == 0
    said = capsys.readouterr().out
    assert "| plain loop |" in said
    assert "| Ray Data stage |" in said
