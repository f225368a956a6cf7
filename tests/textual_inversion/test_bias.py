"""Shares of answers and their intervals, against the textbook formulas worked otherwise."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from textual_inversion.bias import Z_95, Proportion, difference, nearest_caption_proportions


@pytest.mark.parametrize(("count", "n"), [(0, 16), (1, 16), (9, 64), (64, 64)])
def test_wilson_ends_are_where_the_score_test_just_rejects(count: int, n: int) -> None:
    """The definition: the p with |share - p| = z sqrt(p (1 - p) / n)."""
    share = Proportion(count=count, n=n)
    for end in share.interval:
        assert abs(share.value - end) == pytest.approx(Z_95 * sqrt(end * (1 - end) / n), abs=1e-9)
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1
    assert low < high


def test_newcombes_own_example() -> None:
    """Newcombe 1998, table II: 56/70 against 48/80 gives 0.2 with [0.0524, 0.3339]."""
    change, low, high = difference(Proportion(count=48, n=80), Proportion(count=56, n=70))
    assert change == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_no_change_holds_zero_and_a_full_turn_does_not() -> None:
    same = difference(Proportion(count=8, n=32), Proportion(count=8, n=32))
    assert same[1] < 0 == same[0] < same[2]
    assert difference(Proportion(count=32, n=32), Proportion(count=0, n=32))[2] < -0.8


def test_each_picture_goes_to_its_nearest_caption() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    images = torch.tensor([[5.0, 1.0], [0.1, 0.2], [0.3, 0.1], [1.0, 0.0]])
    assert nearest_caption_proportions(images, texts) == [
        Proportion(count=3, n=4),
        Proportion(count=1, n=4),
        Proportion(count=0, n=4),
    ]


@pytest.mark.parametrize(("images", "texts"), [(0, 2), (3, 1)])
def test_nothing_to_choose(images: int, texts: int) -> None:
    with pytest.raises(ValueError, match=f"{images} pictures and {texts} captions"):
        nearest_caption_proportions(torch.ones(images, 2), torch.ones(texts, 2))


@pytest.mark.parametrize(("count", "n"), [(-1, 4), (5, 4), (0, 0)])
def test_a_share_of_nothing(count: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of {n}"):
        Proportion(count=count, n=n)
