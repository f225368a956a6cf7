"""The committed examples fit the script that makes them, and what can be measured of them holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo.captions import TINTS
from demo.examples import COMMANDS, EDITED, draw_mask
from demo.make_manifests import (
    DIVERSE_CONCEPT,
    EXAMPLE_CONCEPTS,
    MANIFEST_SCHEMA,
    PENCIL_CONCEPT,
    SECOND_STYLE_CONCEPT,
    STYLE_CONCEPT,
    diverse_scenes,
    examples_manifest,
)
from demo.tokenizer import load_tokenizer
from pipeline.store.parquet import read_table
from textual_inversion.config import SamplingConfig
from textual_inversion.edit import edit
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.generate import ImageRequest

ROOT = Path(__file__).parents[2]
EXAMPLES, MANIFEST = ROOT / "demo/examples", ROOT / "manifests/examples.parquet"


def test_manifest_is_what_the_script_writes() -> None:
    stored = read_table(MANIFEST)
    assert stored.equals(examples_manifest())
    assert stored.schema.equals(MANIFEST_SCHEMA)
    for row in stored.to_pylist():
        for uri in row["images"]:
            assert Image.open(MANIFEST.parent / uri).size == (64, 64)
        assert len(load_tokenizer(ROOT / "demo/model/tokenizer").tokenize(row["initializer"])) == 1, row


def test_the_diverse_set_has_every_colour_once() -> None:
    assert [scene.tint for scene in diverse_scenes()] == list(TINTS)
    assert len({scene.thing.name for scene in diverse_scenes()}) == 1
    mean_colours = {
        tuple(np.asarray(Image.open(ROOT / f"demo/images/{DIVERSE_CONCEPT}/{i}.png")).mean((0, 1)).round())
        for i in range(len(TINTS))
    }
    assert len(mean_colours) == len(TINTS)


def test_every_example_is_there_and_small() -> None:
    figures = json.loads((EXAMPLES / "figures.json").read_text())
    assert figures["commands"].keys() == {*COMMANDS, "edit"}
    for name in figures["commands"]:
        with Image.open(EXAMPLES / f"{name}.webp") as sheet:
            assert min(sheet.size) >= 128
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) <= 300 * 2**10
    names = {row["concept_id"] for row in read_table(MANIFEST).to_pylist()}
    assert {*EXAMPLE_CONCEPTS, STYLE_CONCEPT, SECOND_STYLE_CONCEPT, PENCIL_CONCEPT, DIVERSE_CONCEPT} == names


@pytest.mark.slow
def test_an_edit_puts_another_thing_on_the_same_table(tmp_path: Path) -> None:
    """With known words, so that only the editing is judged: the world's own judge sees the new thing, not the old."""
    torch.set_num_threads(1)
    draw_mask(tmp_path / "mask.png")
    picture, mask = Image.open(EDITED).convert("RGB"), Image.open(tmp_path / "mask.png")
    backbone = load_backbone(str(ROOT / "demo/model"), device="cpu", precision="float32")
    things = ("lemon", "car", "bear")  # no word of the judge's is nearer to the koala, which is held out
    prompts = [f"a photo of a {thing} on a wooden table" for thing in things]
    requests = [ImageRequest(prompt, seed) for prompt in prompts[:2] for seed in range(4)]
    drawn = edit(backbone, picture, mask, requests, SamplingConfig(batch_size=8))

    judge = ClipExtractor(str(ROOT / "demo/clip"), "cpu")
    answers = (judge.images([picture, *drawn]) @ judge.texts(prompts).T).argmax(1)
    assert answers[0] == 2, "the judge knows the picture that is edited"
    assert (answers[1:] == torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).sum() >= 7
    table = np.asarray(mask) == 0
    assert all((np.asarray(one)[table] == np.asarray(picture)[table]).all() for one in drawn)
