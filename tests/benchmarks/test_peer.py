"""The comparison with diffusers' script, on a stand-in that takes the script's options and learns nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peer
from pipeline.config import RunConfig
from pipeline.store.parquet import read_table
from tests.pipeline.runs import BY_HAND, write_manifest
from tests.tiny_models import DIM, tiny_extractor

SCRIPT = f"""
import argparse, json, pathlib, torch
from safetensors.torch import save_file
parser = argparse.ArgumentParser()
names = ("train_data_dir", "placeholder_token", "initializer_token", "max_train_steps", "output_dir", "learning_rate")
for name in names:
    parser.add_argument(f"--{{name}}", required=True)
parser.add_argument("--scale_lr", action="store_true")
given = parser.parse_known_args()[0]
output = pathlib.Path(given.output_dir)
output.mkdir(parents=True)
photos = len(list(pathlib.Path(given.train_data_dir).iterdir()))
(output / "given.json").write_text(json.dumps(vars(given) | {{"photos": photos}}))
if int(given.max_train_steps) == 3:
    raise SystemExit("three steps are too few")
save_file({{given.placeholder_token: torch.full(({DIM},), 0.1)}}, output / "learned_embeds.safetensors")
"""


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    script, prompts = tmp_path / "script.py", tmp_path / "prompts.txt"
    script.write_text(SCRIPT)
    prompts.write_text("a photo of a {}\na rendering of a {}\n")
    sampling = ("grid.sampling.steps=2", "grid.images_per_prompt=1", "generation.sampling.steps=2")
    values = [f"model={tiny_model}", f"extractor={tiny_extractor('clip', tmp_path / 'clip')}", *sampling,
              "inversion.steps=2", *(f"actors.{name}={value}" for name, value in BY_HAND.items())]  # fmt: skip
    files = ["--manifest", str(write_manifest(tmp_path, ["a", "b"])), "--prompts", str(prompts)]
    settings = [word for value in values for word in ("--set", value)]
    return [
        "--script",
        str(script),
        *files,
        "--output",
        str(tmp_path / "out"),
        "--no-outside",
        "--samples",
        "2",
        *settings,
    ]


@pytest.mark.slow
def test_both_programs_learn_the_same_concepts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--peers", "8", "40@5e-3", "--recipes", "fast"]
    assert peer.main(command) == 0
    rows = read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    setups = ["peer-8", "peer-40@5e-3", "run-fast"]
    assert [(row["setup"], row["concept_id"]) for row in rows] == [(name, each) for name in setups for each in "ab"]
    assert all(len(row["clip_t_pictures"]) == 2 for row in rows)
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 6
    learned = {name: tmp_path / "out" / "learned" / name / "0" / "a" / "out" / "given.json" for name in setups[:2]}
    given = [path.read_text() for path in learned.values()]
    assert '"max_train_steps": "2"' in given[0]
    assert '"scale_lr": true' in given[0]
    assert '"photos": 2' in given[0]
    assert '"initializer_token": "cat"' in given[0]
    assert '"learning_rate": "0.005"' in given[1]
    assert '"scale_lr": false' in given[1]
    said = capsys.readouterr().out
    assert "| run-fast | 400 |" in said
    assert "| run-fast less peer-8 |" in said
    began = (tmp_path / "out" / "learned" / "run-fast" / "0" / "learned.json").stat().st_mtime
    assert peer.main(command) == 0
    assert (tmp_path / "out" / "learned" / "run-fast" / "0" / "learned.json").stat().st_mtime == began


def test_a_script_that_fails_ends_the_comparison(arguments: list[str]) -> None:
    with pytest.raises(RuntimeError, match=r"script\.py ended with 1: three steps are too few"):
        peer.main([*arguments, "--peers", "12", "--recipes"])


def test_a_recipe_with_an_adapter_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="recipe 'textboost-v1' learns an adapter"):
        peer.main([*arguments, "--recipes", "textboost-v1"])


def test_defaults_are_a_run_without_a_recipe(tmp_path: Path) -> None:
    options = peer.parse(["--script", "script.py", "--peers", "8", "--recipes", "defaults"])
    run = peer.programs_of(options, tmp_path, 64)["run-defaults"]
    assert run.samples == RunConfig().inversion.steps * RunConfig().inversion.batch_size
    assert run.what == "`python -m pipeline.run`, defaults"
