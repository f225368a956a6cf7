"""Entropy of named colours, and the colour that covers most of a thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.colours import colour_word, entropy_bits, measure_colours, show_colours
from demo.captions import TINTS
from demo.make_manifests import DIVERSE_CONCEPT, HERE
from tests.tiny_models import tiny_extractor
from textual_inversion.extractors import ClipExtractor


def thing(colour: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste((20, 20, 20), (6, 6, 26, 26))
    picture.paste(colour, (8, 8, 24, 24))
    return picture


def test_entropy() -> None:
    assert entropy_bits("aabb") == 1.0
    assert entropy_bits("abcdefgh") == 3.0
    assert entropy_bits("aaaa") == 0.0


@pytest.mark.parametrize("name", TINTS)
def test_a_thing_in_a_colour_that_has_a_word(name: str) -> None:
    assert colour_word(thing(TINTS[name])) == name


@pytest.mark.parametrize("colour", [(120, 110, 100), (130, 95, 80), (90, 90, 90), (250, 250, 250)])
def test_grey_and_brown_have_no_word(colour: tuple[int, int, int]) -> None:
    assert colour_word(thing(colour)) == ""
    assert colour_word(Image.new("RGB", (32, 32), "white")) == ""


def test_the_diverse_set_has_one_of_each() -> None:
    photos = [Image.open(HERE / "images" / DIVERSE_CONCEPT / f"{i}.png") for i in range(len(TINTS))]
    assert [colour_word(photo) for photo in photos] == list(TINTS)


def test_a_row_and_its_table(tmp_path: Path) -> None:
    extractor = ClipExtractor(str(tiny_extractor("clip", tmp_path)), "cpu")
    pictures = [thing(TINTS["red"]), thing(TINTS["blue"]), thing((120, 110, 100))]
    row = measure_colours(extractor, "car", pictures)
    assert (sum(row["named"].values()), row["mixed"], row["pictures"]) == (3, 1, 3)
    low, high = row["entropy_interval"]
    assert 0 <= low <= row["entropy_bits"] <= high
    assert "| 1 of 3 (6% to 79%) |" in show_colours([{**row, "word": "car", "setup": "the word", "seed": 0}])
