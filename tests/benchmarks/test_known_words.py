"""Inversion of known words on a tiny random model: rows equal those made by hand, differences are word by word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.known_words import ITSELF, WORDS, by_word, main, render_photos, summary
from demo.make_manifests import HERE
from demo.objects import TRAINING
from demo.tokenizer import load_tokenizer
from textual_inversion.config import SamplingConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.fidelity import pixel_scores, to_arrays
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.metrics import clip_i
from textual_inversion.rng import seed_for


def row(setup: str, word: str, psnr_db: float, seed: int = 0) -> dict[str, Any]:
    return {"setup": setup, "concept_id": word, "seed": seed, "psnr_db": psnr_db, "edge_strength": 40.0,
            "edge_ratio": 0.5, "clip_i": psnr_db / 100}  # fmt: skip


ROWS = [
    row(ITSELF, "cat", 20), row(ITSELF, "bus", 18),
    row("mirrored", "cat", 14), row("mirrored", "cat", 16, seed=1), row("mirrored", "bus", 14),
    row("not mirrored", "cat", 18), row("not mirrored", "cat", 18, seed=1), row("not mirrored", "bus", 18),
]  # fmt: skip


def test_seeds_are_averaged_before_words() -> None:
    assert "| cat | mirrored | 15.000 | 40.000 | 0.500 | 0.150 |" in by_word(ROWS)
    assert by_word(ROWS).splitlines()[2].startswith("| bus | ")


def test_differences_are_taken_word_by_word() -> None:
    lines = summary(ROWS).splitlines()
    # t(0.975) of 1 degree of freedom is 12.706, and the standard error of 20 and 18 is 1
    assert lines[2] == ("| the word itself | 19.000 ± 12.706 | 40.000 ± 0.000 | 0.500 ± 0.000 | 0.190 ± 0.127 | 2 |")
    same = "+0.000 ± 0.000 | +0.000 ± 0.000"
    assert lines[-3:] == [
        f"| mirrored less the word itself | -4.500 ± 6.353 | {same} | -0.045 ± 0.064 |",
        f"| not mirrored less the word itself | -1.000 ± 12.706 | {same} | -0.010 ± 0.127 |",
        f"| not mirrored less mirrored | +3.500 ± 6.353 | {same} | +0.035 ± 0.064 |",
    ]


def test_words_are_taught_to_the_demo_model() -> None:
    names = {thing.name for thing in TRAINING}
    assert [each for each in WORDS if not {*each.split(":")} <= names] == []
    vocabulary = load_tokenizer(HERE / "model/tokenizer").get_vocab()
    assert [word for each in WORDS for word in each.split(":") if f"{word}</w>" not in vocabulary] == []


def test_an_unknown_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'violin' is no taught object"):
        render_photos("violin", tmp_path)


def test_rows_by_hand(
    tiny_model: Path, tiny_backbone: Backbone, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model={tiny_model}", f"extractor={judge}", "inversion.steps=2", "inversion.batch_size=2",
                "generation.sampling.batch_size=4"]  # fmt: skip
    command = ["--words", "cat:dog", "--photos", "drawn", "--samples", "2", "--seeds", "0", "1"]
    assert main([*command, "--output", str(tmp_path / "out"), *(f"--set={each}" for each in settings)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 words, drawn photos, 2 steps of 2, 2 seeds, 2 pictures of each\n")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [(row["setup"], row["seed"]) for row in rows] == [
        (ITSELF, 0), ("mirrored", 0), ("mirrored", 1), ("not mirrored", 0), ("not mirrored", 1)
    ]  # fmt: skip
    assert len({row["psnr_db"] for row in rows}) == 5

    def drawn(purpose: str, count: int) -> list[Image.Image]:
        seeds = [seed_for(0, "cat", f"known words, {purpose}", i) for i in range(count)]
        sampling = SamplingConfig(solver="dpm++", steps=20, batch_size=4)
        return generate(tiny_backbone, [ImageRequest("a photo of a cat", seed) for seed in seeds], sampling)

    photos, pictures = drawn("photos", 5), drawn("pictures", 2)
    by_hand = pixel_scores(*(to_arrays(each, photos[0].size) for each in (pictures, photos)))
    for name, values in by_hand.items():
        assert rows[0][name] == pytest.approx(values.mean().item(), abs=1e-4)
    extractor = ClipExtractor(str(judge), "cpu")
    wanted = clip_i(extractor.images(pictures), extractor.images(photos))
    assert rows[0]["clip_i"] == pytest.approx(wanted, abs=1e-5)
    assert Image.open(tmp_path / "out" / "cat.png").format == "PNG"
