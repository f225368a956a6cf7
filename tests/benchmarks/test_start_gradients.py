from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.start_gradients import pull
from textual_inversion.concept import Concept
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors


def test_the_pull_is_the_losss_gradient(tiny_backbone: Backbone, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 40, 90)).save(tmp_path / "a.png")
    concept = Concept(
        concept_id="c", placeholder_token="<c>", images=(str(tmp_path / "a.png"),), initializer="cat"
    )  # fmt: skip
    rows = class_vectors(concept, tiny_backbone)
    (key,) = rows
    _, norm = pull(tiny_backbone, concept, rows)

    def loss(coordinate: int, by: float) -> float:
        moved = rows[key].clone()
        moved[coordinate] += by
        return pull(tiny_backbone, concept, {key: moved})[0]

    slopes = [(loss(i, 1e-2) - loss(i, -1e-2)) / 2e-2 for i in range(len(rows[key]))]
    assert float(torch.tensor(slopes).norm()) == pytest.approx(norm, rel=0.05)
