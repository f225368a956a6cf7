"""The common algorithm does what it is said to do, and the benchmark runs on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import inversion
from benchmarks.inversion_quality import Curve, describe_step, last_row, steps_to_reach
from benchmarks.restatement import CommonAlgorithm
from tests.pipeline.runs import write_manifest
from textual_inversion.concept import Concept
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import initial_rows

CONCEPT = Concept(concept_id="k", placeholder_token="<k>", images=("x",), initializer="cat")
PHOTOS = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]


@pytest.fixture
def common(tiny_model: Path) -> CommonAlgorithm:
    torch.set_num_threads(1)
    return CommonAlgorithm.load(str(tiny_model), learning_rate=0.01, batch_size=2)


def test_only_the_new_row_is_left_changed(common: CommonAlgorithm, tiny_backbone: Backbone) -> None:
    common.begin(CONCEPT, PHOTOS)
    start, table = common.row(), common._table.detach().clone()
    assert torch.equal(start, initial_rows(CONCEPT, tiny_backbone, noise=0.0, seed=0)["clip_l"])
    looks: dict[int, torch.Tensor] = {}
    learned = common.learn(3, looks.__setitem__, 2)
    assert 0.01 < (learned - start).abs().max() < 0.05  # three steps of 0.01
    assert list(looks) == [2]
    assert not torch.equal(looks[2], learned)
    others = common._others
    assert int((~others).sum()) == 1
    assert torch.equal(common._table[others], table[others])
    state = common._optimizer.state[common._table]
    assert state["exp_avg_sq"].shape == common._table.shape  # moments for every word

    common.begin(CONCEPT, PHOTOS)  # nothing of the concept before is left
    assert torch.equal(common._table, table)
    assert torch.equal(common.learn(3), learned) is False  # timesteps and noise are not seeded, as commonly


def test_the_autoencoder_runs_at_every_step(common: CommonAlgorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    encode = common._vae.encode

    def counting(pixels: torch.Tensor) -> Any:
        seen.append(pixels.shape)
        return encode(pixels)

    monkeypatch.setattr(common._vae, "encode", counting)
    common.begin(CONCEPT, PHOTOS)
    common.learn(3)
    assert seen == [(2, 3, 32, 32)] * 3


def test_what_it_cannot_start_from(common: CommonAlgorithm) -> None:
    several = Concept(concept_id="k", placeholder_token="<k>", images=("x",), initializer="cat dog")
    with pytest.raises(ValueError, match=r"'cat dog'\) of 2 tokens"):
        common.begin(several, PHOTOS)


def test_when_a_score_is_reached() -> None:
    scores = {
        step: [{"clip_i": score - 0.1}, {"clip_i": score + 0.1}] for step, score in ((0, 0.2), (10, 0.4), (20, 0.3))
    }
    curve = Curve(batch_size=2, once_s=1.0, step_s=0.5, scores=scores)
    assert steps_to_reach(curve, 0.3) == pytest.approx(5)
    assert describe_step(steps_to_reach(curve, 0.3), curve) == "after 10 sample-steps, 3.5 s a concept"
    assert steps_to_reach(curve, 0.1) == 0
    assert steps_to_reach(curve, 0.5) is None
    rows = {0: torch.zeros(1), 10: torch.ones(1)}
    assert last_row(rows, 20) is rows[10]
    assert last_row(rows, 9) is rows[0]


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    manifest = write_manifest(tmp_path, ["a", "b"])
    settings = [f"model={tiny_model}", "extractor=", "inversion.batch_size=2", "inversion.steps=100"]
    files = ["--manifest", str(manifest), "--concepts", "2", "--steps", "2"]
    return files + [word for value in settings for word in ("--set", value)]


def cells(said: str) -> list[list[str]]:
    """The table's, without its head."""
    lines = [line for line in said.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_the_speed_of_a_tiny_model(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inversion.main([*arguments, "--slots", "1,2", "--repetitions", "1"]) == 0
    rows = cells(capsys.readouterr().out)
    names = [
        "common algorithm",
        "engine, 1 in flight",
        "engine, 2 in flight",
        "engine, 2 in flight, passes of their own",
    ]
    assert [row[1] for row in rows] == names
    assert rows[0][3] == "1.00"


@pytest.mark.slow
def test_two_processes_share_concepts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inversion.main([*arguments, "--slots", "1", "--repetitions", "1", "--processes", "2"]) == 0
    assert len(cells(capsys.readouterr().out)) == 2


def test_the_quality_of_a_tiny_model(arguments: list[str], judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["grid.images_per_prompt=1", "grid.sampling.steps=1", "grid.sampling.batch_size=2", f"extractor={judge}"]
    settings = [word for value in small for word in ("--set", value)]
    assert inversion.main([*arguments, *settings, "--quality", "--every", "1", "--slots", "2"]) == 0
    said = capsys.readouterr().out
    rows = cells(said)
    assert [row[:3] for row in rows] == [
        *(["common algorithm", str(step), str(4 * step)] for step in range(3)),
        *(["engine", str(step), str(2 * step)] for step in range(3)),
    ]
    assert rows[0][4:] == rows[3][4:]  # they start alike
    assert "times as many concepts an hour" in said
    assert "what the engine ends with, is reached by the common algorithm" in said
