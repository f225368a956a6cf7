"""Counts, sentences and labels of a comparison of a word's pictures before and after it is learned anew."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pipeline.config import RunConfig
from pipeline.sheets.bias_report import BiasReport, load_extractor, measure_bias
from textual_inversion.bias import Proportion

CAPTIONS = ("a red car", "a blue car")


class Brightness:
    """Feature extractor that finds dark pictures nearest to the first caption and bright ones nearest to the second."""

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        bright = torch.tensor([picture.getpixel((0, 0)) / 255 for picture in pictures])
        return torch.stack([1 - bright, bright], dim=1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(2)[: len(texts)]


def pictures(*levels: int) -> list[Image.Image]:
    return [Image.new("L", (2, 2), level) for level in levels]


def report() -> BiasReport:
    return measure_bias(Brightness(), CAPTIONS, pictures(0, 255), pictures(9, 9, 9, 240), pictures(9, 240, 240, 240))  # type: ignore[arg-type]


def test_pictures_are_counted_by_their_nearest_caption() -> None:
    first, second = report().rows()
    assert first["caption"] == CAPTIONS[0]
    assert (first["photos"], second["photos"]) == ({"count": 1, "n": 2}, {"count": 1, "n": 2})
    assert (first["before"]["count"], first["after"]["count"]) == (3, 1)
    assert (first["before"]["share"], second["after"]["share"]) == (0.75, 0.75)
    assert first["change"]["value"] == -0.5
    low, high = first["change"]["interval"]
    assert low < -0.5 < high
    assert first["before"]["interval"] == pytest.approx(Proportion(count=3, n=4).interval, abs=1e-4)


def test_photos_that_are_not_known_are_left_out() -> None:
    before = (Proportion(count=1, n=1), Proportion(count=0, n=1))
    rows = BiasReport(captions=CAPTIONS, photos=(), before=before, after=before).rows()
    assert all("photos" not in row for row in rows)


def test_lines_and_labels_say_the_counts() -> None:
    assert report().lines()[0].startswith("a red car: 3/4 (30% to 95%) -> 1/4 (5% to 70%), change -50% (")
    assert report().labels(["a car", "a <car>"]) == [
        "a car: 3 of 4 'a red car', 1 of 4 'a blue car'",
        "a <car>: 3 of 4 'a blue car', 1 of 4 'a red car'",
    ]


@pytest.mark.parametrize("captions", [[], ["a"], ["a", "a"]])
def test_fewer_than_two_different_captions_are_refused(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="two or more different captions"):
        load_extractor(RunConfig(), captions)


def test_the_demo_clip_is_refused_for_other_models() -> None:
    with pytest.raises(ValueError, match="needs a feature extractor"):
        load_extractor(RunConfig(model="other/model"), CAPTIONS)
