"""Naming of pairs by a fake extractor that sees the mean colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.composition import KNOWN, LEARNED, are_both_named, chance, halves, pairs_of, show_pairs, verdict

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


def mean_colour(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).float().mean((0, 1)) for picture in pictures])


def two(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (16, 16), COLOURS[left])
    picture.paste(COLOURS[right], (8, 0, 16, 16))
    return picture


CANDIDATES = {name: torch.tensor([colour], dtype=torch.float32) for name, colour in COLOURS.items()}


def test_halves_are_squares_of_either_side() -> None:
    left, right = halves(two("red", "blue"))
    assert (left.size, right.size) == ((16, 16), (16, 16))
    assert (left.getpixel((8, 8)), right.getpixel((8, 8))) == (COLOURS["red"], COLOURS["blue"])


def test_both_are_named_in_either_order() -> None:
    pictures = [two("red", "blue"), two("blue", "red"), two("blue", "blue"), two("red", "green")]
    shares = are_both_named(mean_colour, pictures, ("red", "blue"), CANDIDATES)
    assert shares == {"whole": 0.5, "halves": 0.5}
    with pytest.raises(ValueError, match="no photos of 'pink'"):
        are_both_named(mean_colour, pictures, ("red", "pink"), CANDIDATES)


def test_every_concept_is_in_two_pairs() -> None:
    assert pairs_of(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert pairs_of(["a", "b"]) == [("a", "b")]


def test_chance() -> None:
    assert chance(4) == {"whole": pytest.approx(1 / 6), "halves": pytest.approx(2 / 16)}
    generator = np.random.default_rng(0)
    drawn = [tuple(sorted(generator.integers(4, size=2))) for _ in range(20000)]
    assert sum(pair == (0, 1) for pair in drawn) / 20000 == pytest.approx(chance(4)["halves"], abs=0.01)


def test_the_table_and_its_sentence() -> None:
    def row(setup: str, pair: str, halves: float) -> dict[str, Any]:
        return {"setup": setup, "concept_id": pair, "seed": 0, "prompt": "a {} and a {}", "extractor": "clip",
                "candidates": 4, "whole": 0.5, "halves": halves}  # fmt: skip

    rows = [row(LEARNED, "a + b", 0.6), row(LEARNED, "b + c", 0.8), row(KNOWN, "d + e", 0.9)]
    lines = show_pairs(rows).splitlines()
    assert lines[2] == (
        "| a {} and a {} | clip | two learned concepts | 2 | 0.500 ± 0.000 (0.167) | 0.700 ± 1.271 (0.125) |"
    )
    assert "0.700 ± 1.271 of the pictures show both learned concepts, +0.575 ± 1.271 above chance" in verdict(rows)
