"""The order of the paper's setups as answers, and every setup that a claim names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.claims import (
    BASE,
    ORDER,
    QUESTIONS,
    Claims,
    ask_bias,
    ask_composition,
    ask_style,
    main,
    parse,
    show_order,
)
from benchmarks.setups import find
from pipeline.actor.library import LearnedConcept, Library
from tests.pipeline.runs import BY_HAND, write_photo
from tests.tiny_models import DIM, tiny_extractor
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import dump_diffusers


def rows(setup: str, clip_i: tuple[float, float, float], clip_t: float) -> list[dict[str, Any]]:
    return [
        {"setup": setup, "concept_id": name, "seed": 0, "clip_i": value, "clip_t": clip_t}
        for name, value in zip("abc", clip_i, strict=True)
    ]


def test_claims_are_answered_by_their_intervals() -> None:
    measured = [
        *rows(BASE, (0.5, 0.6, 0.7), 0.4),
        *rows("high-lr", (0.6, 0.71, 0.8), 0.5),
        *rows("low-lr", (0.5, 0.9, 0.3), 0.5),
        *rows("2-word", (0.51, 0.59, 0.7), 0.3),
        *rows("3-word", (0.7, 0.8, 0.91), 0.3),
    ]
    answers = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in
               show_order(measured).splitlines()[2:]}  # fmt: skip
    assert answers["the high rate is nearer to the photos"] == "as claimed"
    assert answers["the high rate follows the prompt less"] == "not so"
    assert answers["the low rate is farther from the photos"] == "undecided"
    assert answers["two vectors are no nearer to the photos"] == "as claimed"
    assert answers["three vectors are no nearer to the photos"] == "not so"
    assert answers["long captions are farther from the photos"] == "not measured"


def test_every_claim_is_of_a_setup() -> None:
    assert {find(setup).what for _, setup, _, _ in ORDER}
    assert parse([]).only == list(QUESTIONS)


@pytest.fixture
def claims(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claims:
    """Claims on a tiny model, whose concepts were learned elsewhere: three objects and a style."""
    clip = tiny_extractor("clip", tmp_path / "clip")
    library = Library(
        LearnedConcept(
            name=name, placeholder_token=f"<{name}>", uri=write_embedding(tmp_path, name, seed), category=category,
            initializer=word, images=tuple(write_photo(tmp_path / f"{name}-{i}.png", 10 * seed + i) for i in range(2)),
        )
        for seed, (name, category, word) in enumerate(
            [("a", "object", "cat"), ("b", "object", "dog"), ("c", "object", "toy"), ("line", "style", "art")]
        )
    )  # fmt: skip
    monkeypatch.setattr(Claims, "learned", lambda _self, _manifest, _seed: library)
    monkeypatch.setattr("demo.captions.STYLE_TEMPLATES", {"oil": ("a rendering of a {}",)})
    monkeypatch.setattr("demo.captions.STYLE_NAMES", {"oil": "snow"})
    settings = [f"model={tiny_model}", f"extractor={clip}", "generation.sampling.batch_size=4"]
    command = ["--samples", "2", "--bias-pictures", "3", "--diverse", "a:cat", "--objects", "cat", "dog",
               "--output", str(tmp_path / "out"), *(f"--set={each}" for each in settings)]  # fmt: skip
    return Claims(parse(command))


def write_embedding(folder: Path, name: str, seed: int) -> str:
    rows = 0.3 * torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))
    path = folder / f"{name}.safetensors"
    path.write_bytes(dump_diffusers(LearnedEmbedding(placeholder_token=f"<{name}>", vectors={"clip_l": rows})))
    return str(path)


def test_pairs_are_drawn_of_learned_concepts_and_of_known_words(claims: Claims) -> None:
    said = ask_composition(claims)
    rows = json.loads(claims.store.get("composition.json"))
    assert len(rows) == 2 * 3 * 2  # learned and known, three pairs, two prompts
    assert {row["concept_id"] for row in rows} == {"a + b", "b + c", "c + a", "cat + dog", "dog + toy", "toy + cat"}
    assert all(row["halves"] in (0, 0.5, 1) and row["candidates"] == 3 for row in rows)
    assert "(0.333)" in said


def test_colours_of_photos_and_of_a_word_before_and_after(claims: Claims) -> None:
    said = ask_bias(claims)
    rows = json.loads(claims.store.get("bias.json"))
    assert [(row["setup"], row["pictures"]) for row in rows] == [("photos", 2), ("the word", 3), ("learned anew", 3)]
    assert "| cat | learned anew | 0 |" in said


def test_objects_are_drawn_in_learned_and_in_named_styles(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def choose(self, pictures: list[Image.Image], options: list[list[str]]) -> np.ndarray:
            return np.array([options[0].index("a photo of a cat")] * len(pictures))

    monkeypatch.setattr("benchmarks.claims.load_classifier", lambda _path: Fake())
    ask_style(claims)
    rows = json.loads(claims.store.get("style.json"))
    assert [(row["setup"], row["concept_id"], row["object_named"]) for row in rows] == [
        (setup, thing, float(thing == "cat"))
        for thing in ("cat", "dog")
        for setup in ("learned line", "initializer of line", "oil, by name")
    ]
    assert {row["styles"] for row in rows} == {2}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\na photo of a {} on the beach\n")
    small = ["grid.sampling.steps=2", "grid.images_per_prompt=1", "grid.prompts=['a photo of a {}']",
             *(f"actors.{name}={value}" for name, value in BY_HAND.items())]  # fmt: skip
    questions = ["composition", "mask"]  # bias and style learn by the same run as composition
    options = ["--concepts", "2", "--steps", "2", "--samples", "1", "--bias-pictures", "2", "--objects", "cat",
               "--no-outside", "--prompts", str(prompts), "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(["--only", *questions, *options, *(f"--set={each}" for each in small)]) == 0
    said = capsys.readouterr().out
    for words in ("two learned concepts", "| masked less unmasked |"):
        assert words in said
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == set(questions)
