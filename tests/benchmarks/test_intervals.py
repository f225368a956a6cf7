"""Intervals over concepts against numbers known by hand."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from benchmarks.intervals import (
    against,
    bootstrap_interval,
    over_concepts,
    show_paired,
    spread_over_seeds,
)
from pipeline.report.intervals import Interval


def row(setup: str, concept: str, clip_i: float | None, seed: int = 0) -> dict[str, Any]:
    return {"setup": setup, "concept_id": concept, "seed": seed, "clip_i": clip_i}


ROWS = [
    row("base", "a", 0.5), row("base", "b", 0.7), row("base", "c", 0.9),
    row("other", "a", 0.4), row("other", "a", 0.8, seed=1), row("other", "b", 0.9), row("other", "d", 0.1),
    row("other", "c", None),
]  # fmt: skip


def test_seeds_are_averaged_before_concepts_and_concepts_are_paired() -> None:
    mean = over_concepts(ROWS, "clip_i")["other"]
    assert mean is not None
    assert (mean.mean, mean.n) == (pytest.approx((0.6 + 0.9 + 0.1) / 3), 3)
    difference = against(ROWS, "clip_i", "base")["other"]
    assert difference is not None
    assert (difference.mean, difference.n) == (pytest.approx((0.1 + 0.2) / 2), 2)  # c has no score, d no partner
    assert against(ROWS, "clip_i", "absent")["other"] is None


def test_the_spread_over_seeds_is_within_a_concept() -> None:
    spread = spread_over_seeds(ROWS, "clip_i")
    assert spread == {"base": None, "other": Interval(pytest.approx(0.2828427), None, 1)}


def test_a_bootstrap_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    values = [0.0] * 20 + [1.0] * 20
    low, high = bootstrap_interval(values, fmean)
    # the mean of 40 coins has the standard deviation 0.079
    assert low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.03)
    assert high == pytest.approx(0.5 + 1.96 * 0.079, abs=0.03)
    assert bootstrap_interval(values, fmean) == (low, high)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([], fmean)


def test_the_paired_tables() -> None:
    assert show_paired(ROWS[:5], {"clip_i": "CLIP-I"}, "base", {"other": "two seeds"}) == (
        "| setup | CLIP-I | concepts |  |\n|---|---|---|---|\n"
        "| base | 0.700 ± 0.497 | 3 |  |\n| other | 0.600 | 1 | two seeds |\n\n"
        "| difference, concept by concept | CLIP-I |\n|---|---|\n| other less base | +0.100 |\n"
    )
