"""Pictures compared with the photos of other concepts: which are others, and which is the nearest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.actor.other_photos import OtherPhotos
from pipeline.config import RunConfig
from pipeline.sample_config import GateConfig
from textual_inversion.concept import Concept
from textual_inversion.extractors import ClipExtractor

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PURPLE = torch.tensor([[200.0, 0.0, 100.0]])


class MeanColour:
    """Features are the mean colour."""

    def __init__(self) -> None:
        self.pictures = 0

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        self.pictures += len(pictures)
        return torch.tensor([picture.convert("RGB").resize((1, 1)).getpixel((0, 0)) for picture in pictures]).float()


@pytest.fixture
def clip() -> MeanColour:
    return MeanColour()


def write(folder: Path, *rows: tuple[str, str, str]) -> str:
    """Write a manifest of concepts with one photo each: id, colour and category."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    images = [[str(folder / f"{name}.png")] for _, name, _ in rows]
    columns = {"concept_id": [row[0] for row in rows], "images": images, "category": [row[2] for row in rows]}
    pq.write_table(pa.table(columns), folder / "others.parquet")
    return str(folder / "others.parquet")


def others(manifest: str, clip: MeanColour) -> OtherPhotos:
    extractor: ClipExtractor = clip  # type: ignore[assignment]  # a stand-in
    return OtherPhotos(RunConfig(gate=GateConfig(others=manifest)), extractor)


def concept(name: str, image: str = "elsewhere.png") -> Concept:
    return Concept(concept_id=name, placeholder_token="<it>", images=(image,))


def cosine_to(name: str) -> float:
    return float(torch.cosine_similarity(PURPLE, torch.tensor([COLOURS[name]]).float()))


def test_the_nearest_of_the_others_counts(tmp_path: Path, clip: MeanColour) -> None:
    """The concept itself is none of them, by its id or by a photo; nor is a style."""
    rows = [("r", "red", "object"), ("g", "green", "object"), ("b", "blue", "object"), ("s", "red", "style")]
    found = others(write(tmp_path, *rows), clip)
    assert found.nearest(concept("new"), PURPLE) == pytest.approx(cosine_to("red"))
    assert found.nearest(concept("r"), PURPLE) == pytest.approx(cosine_to("blue"))
    assert found.nearest(concept("again", str(tmp_path / "red.png")), PURPLE) == pytest.approx(cosine_to("blue"))
    assert clip.pictures == 4, "each photo is looked at once"


def test_a_concept_without_others_has_no_score(tmp_path: Path, clip: MeanColour) -> None:
    assert others("", clip).nearest(concept("a"), PURPLE) is None
    assert others(write(tmp_path, ("a", "red", "object")), clip).nearest(concept("a"), PURPLE) is None


def test_a_concept_with_a_broken_photo_is_left_out_and_told(
    tmp_path: Path, clip: MeanColour, caplog: pytest.LogCaptureFixture
) -> None:
    found = others(write(tmp_path, ("r", "red", "object"), ("b", "blue", "object")), clip)
    (tmp_path / "red.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert found.nearest(concept("new"), PURPLE) == pytest.approx(cosine_to("blue"))
    assert "gate.others: concept 'r' is left out" in caplog.text


def test_a_store_that_is_away_for_a_moment_is_asked_again(
    tmp_path: Path, clip: MeanColour, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = others(write(tmp_path, ("r", "red", "object")), clip)

    def away(*_arguments: object) -> None:
        raise OSError("no route")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.actor.other_photos.open_pictures", away)
        with pytest.raises(OSError, match="no route"):
            found.nearest(concept("new"), PURPLE)
    assert found.nearest(concept("new"), PURPLE) == pytest.approx(cosine_to("red"))
