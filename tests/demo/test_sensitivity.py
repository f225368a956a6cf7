"""What the committed feature extractors see, and the tables that say so, on the committed photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from demo.objects import HELD_OUT
from demo.sensitivity import (
    CHANGES,
    PART_PX,
    Drawn,
    erase_part,
    is_symmetric,
    likeness_table,
    photos_of,
    sensitivity_table,
)
from textual_inversion.extractors import ImageExtractor, load_extractor
from textual_inversion.metrics import mirror_margin_between_photos

ROOT = Path(__file__).parents[2]
MOCO = ROOT / "demo/moco"
CONCEPTS = [held.concept_id for held in HELD_OUT]
WHITE = (0, 1, 3)
"""Numbers of the photos on a white ground."""


@pytest.fixture(scope="module")
def moco() -> ImageExtractor:
    return load_extractor(str(MOCO), "cpu")


@pytest.fixture(scope="module")
def on_white() -> dict[str, list[Image.Image]]:
    return {name: [photos_of(name)[index] for index in WHITE] for name in CONCEPTS}


def test_the_committed_network_is_small() -> None:
    assert sum(path.stat().st_size for path in MOCO.iterdir()) <= 2.5e6


def test_photos_of_one_object_are_nearest_to_each_other(
    moco: ImageExtractor, on_white: dict[str, list[Image.Image]]
) -> None:
    features = torch.stack([moco.images(photos) for photos in on_white.values()])
    nearest = (features[:, 0] @ features[:, 1].T).argmax(1)
    assert (nearest == torch.arange(len(CONCEPTS))).float().mean() > 0.9


def test_mirror_images_are_farther_than_other_poses(
    moco: ImageExtractor, on_white: dict[str, list[Image.Image]]
) -> None:
    turned = [photos for photos in on_white.values() if not is_symmetric(photos[0])]
    assert len(turned) > 10
    margins = torch.stack(
        [
            mirror_margin_between_photos(moco.images(photos), moco.images([ImageOps.mirror(photo) for photo in photos]))
            for photos in turned
        ]
    )
    assert (margins.mean(1) > 0).float().mean() > 0.8


def test_an_erased_part_is_a_square_of_the_object() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((200, 0, 0), (20, 20, 44, 44))
    erased = erase_part(picture, np.random.default_rng(0))
    differs = (np.asarray(erased) != np.asarray(picture)).any(2)
    assert PART_PX**2 / 4 <= differs.sum() <= PART_PX**2
    assert np.asarray(erased)[differs].min() == 255


def test_tables_of_features_that_are_small_pictures(on_white: dict[str, list[Image.Image]]) -> None:
    def features(pictures: Sequence[Image.Image]) -> Tensor:
        small = [np.array(picture.resize((8, 8), Image.Resampling.BOX)) for picture in pictures]
        return 255 - torch.from_numpy(np.stack(small)).float().flatten(1)

    names = ("taxi", "tomato", "duck")
    objects = {name: Drawn(photos=photos_of(name), scenes={"white ground": on_white[name]}) for name in names}
    likeness, sensitivity = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in (likeness_table(objects, {"small": features}), sensitivity_table(objects, {"small": features}, 0))
    )
    assert likeness[2][0] == "small"
    assert float(likeness[2][1]) > float(likeness[2][2])
    assert likeness[0][3:] == ["top-1, white ground"]
    assert likeness[2][3:] == ["100.0 %"]
    assert [sensitivity[0][1 + 2 * index].split(" (")[0] for index in range(len(CHANGES))] == list(CHANGES)
    assert sensitivity[2][1] == "100 %"  # mirrored
    assert 0.1 < float(sensitivity[2][2]) < 1.5
