"""DreamBench's folder as a manifest and prompts, and the whole command on a small copy of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import dreambench
from benchmarks.dreambench import LIVE, prompts_of, read_classes, read_subjects
from pipeline.bulk.protocols import PROTOCOLS
from pipeline.config_file import load_config
from pipeline.inputs.models import ROOT
from pipeline.inputs.prompt_table import Prompt
from pipeline.store.parquet import read_table
from tests.pipeline.runs import BY_HAND

LISTED = """Classes

subject_name,class
tiger,cat
taxi,stuffed animal
absent,toy

Prompts

Object Prompts
'a {0} {1}, he said'.format(unique_token, class_token),
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two subjects of the demo world under DreamBench's layout."""
    folder = tmp_path / "dataset"
    for subject in ("tiger", "taxi"):
        shutil.copytree(ROOT / "demo/images" / subject, folder / subject)
    (folder / "tiger" / "notes.txt").write_text("not a photo")
    (folder / dreambench.CLASSES).write_text(LISTED)
    return folder


def test_subjects_and_their_classes(dataset: Path, tmp_path: Path) -> None:
    assert read_classes(LISTED) == {"tiger": "cat", "taxi": "stuffed animal", "absent": "toy"}
    rows = read_subjects(dataset)
    assert [(row["concept_id"], row["initializer"]) for row in rows] == [("tiger", "cat"), ("taxi", "stuffed animal")]
    assert [Path(path).name for path in rows[0]["images"]] == [f"{i}.png" for i in range(5)]
    with pytest.raises(ValueError, match=r"has no prompts_and_classes.txt"):
        read_subjects(tmp_path)
    (tmp_path / dreambench.CLASSES).write_text(LISTED)
    with pytest.raises(ValueError, match=r"has no photos of the subjects"):
        read_subjects(tmp_path)


def test_live_subjects_have_prompts_of_their_own() -> None:
    subjects = [{"concept_id": "dog6", "initializer": "dog"}, {"concept_id": "can", "initializer": "can"}]
    rows = prompts_of(subjects)
    of = {name: [row["prompt"] for row in rows if row["concept_id"] == name] for name in ("dog6", "can")}
    assert {name: len(prompts) for name, prompts in of.items()} == {"dog6": 25, "can": 25}
    assert len(set(of["dog6"]) & set(of["can"])) == 15  # ten places, five adjectives
    assert Prompt(of["dog6"][17]).filled("<dog6>", "dog") == "a <dog6> dog wearing pink glasses"
    assert Prompt(of["can"][24]).filled("<can>", "can") == "a cube shaped <can> can"
    assert LIVE == ("cat", "dog")


def test_the_recipe_is_a_configuration() -> None:
    config = load_config(dreambench.RECIPE.read_text())
    assert config.evaluation.protocol == "dreambench"
    assert config.extractor == "openai/clip-vit-base-patch32"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_on_the_demo_world(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = PROTOCOLS["dreambench"]
    monkeypatch.setitem(PROTOCOLS, "dreambench", replace(named, sampling=replace(named.sampling, steps=2)))
    # the longest prompts of objects are too long for the demo's model
    (dataset / dreambench.CLASSES).write_text(LISTED.replace("stuffed animal", "dog"))
    small = ["model=demo/model", "extractor=demo/clip", "evaluation.dino=demo/clip", "device=cpu", "actors.count=1",
             "inversion.steps=2", "inversion.batch_size=1", "evaluation.images_per_prompt=1",
             "evaluation.references=false", "grid.prompts=['{}']", "grid.images_per_prompt=1",
             "grid.sampling.steps=2", *(f"actors.{name}={value}" for name, value in BY_HAND.items())]  # fmt: skip
    output = tmp_path / "out"
    arguments = [str(dataset), "--output", str(output)] + [word for pair in small for word in ("--set", pair)]
    assert dreambench.main(arguments) == 0
    said = capsys.readouterr().out
    assert "| learned | 2 |" in said
    rows = read_table(output / "evaluation" / "dreambench.parquet").to_pylist()
    assert len(rows) == 50
    assert all(row["dino"] == row["clip_i"] for row in rows)  # the same judge twice
    assert {row["text"] for row in rows if row["concept_id"] == "tiger"} >= {"a cat in a chef outfit"}
