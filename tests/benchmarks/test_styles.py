"""Directions of styles on features made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.styles import OBJECTS, direction, nearest_styles, show_styles
from demo.make_manifests import style_scenes
from demo.objects import TRAINING

PLAIN = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.2, 0.0, 0.0]])
STYLES = {"sketch": torch.tensor([0.0, 0.0, 1.0, 0.0]), "oil": torch.tensor([0.0, 0.0, 0.0, 1.0])}


def test_a_direction_leaves_the_object_out() -> None:
    styled = PLAIN + 0.5 * STYLES["sketch"]
    assert direction(styled, PLAIN).tolist() == pytest.approx([0, 0, 1, 0])


def test_a_picture_is_nearest_to_its_style_whatever_the_object() -> None:
    cat = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    pictures = torch.cat([cat + 0.3 * STYLES["oil"], cat + 0.2 * STYLES["sketch"]])
    assert nearest_styles(pictures, cat, STYLES) == ["oil", "sketch"]


def test_objects_are_known_and_not_those_of_the_exemplars() -> None:
    assert set(OBJECTS) <= {thing.name for thing in TRAINING}
    assert not set(OBJECTS) & {scene.thing.name for scene in style_scenes()}


def test_the_table() -> None:
    def row(thing: str, named: float) -> dict[str, Any]:
        return {"setup": "learned line-art", "concept_id": thing, "seed": 0, "extractor": "clip", "styles": 8,
                "named": named, "object_named": 1.0}  # fmt: skip

    lines = show_styles([row("cat", 0.5), row("bus", 0.7)]).splitlines()
    assert lines[2] == "| clip | learned line-art | 0.600 ± 1.271 (0.125) | 1.000 ± 0.000 |"
