from __future__ import annotations

import math

import numpy as np
import pytest

from textual_inversion.config import InversionConfig, StopConfig
from textual_inversion.stopping import Budget, CurvePoint, Dvar, EvalLoss, is_eval_step, settled, stop_rule_from_config

RECORDED = [math.exp(-i / 8) + 0.02 * math.sin(7.0 * i) for i in range(60)]
"""A loss that falls and then only wavers, as those on a frozen batch do."""


def curve(steps: int) -> list[CurvePoint]:
    return [CurvePoint(step, 0.5, 0.4) for step in range(1, steps + 1)]


def test_a_budget_ends_at_its_last_step() -> None:
    rule = Budget(3)
    assert [rule.due(step) for step in range(5)] == [False, False, False, True, True]
    assert rule.stops(curve(3), [])
    assert not rule.stops(curve(2), [])


def test_dvar_on_a_recorded_curve_ends_where_numpy_says() -> None:
    """The released code: `np.var(hist[-n:]) / np.var(hist) < alpha` once there are n."""
    window, ratio = 15, 0.15
    expected = [
        n >= window and bool(np.var(RECORDED[n - window : n]) / np.var(RECORDED[:n]) < ratio) for n in range(1, 61)
    ]
    assert [settled(RECORDED[:n], window, ratio) for n in range(1, 61)] == expected
    assert 20 < expected.index(True) < 50


def test_a_loss_that_only_wavers_or_still_falls_has_not_settled() -> None:
    assert not settled([1.0] * 40, 15, 0.15)
    assert not settled([0.5 + 0.1 * (-1) ** i for i in range(40)], 15, 0.15)
    assert not settled([1 - i / 40 for i in range(40)], 35, 0.15)


def test_dvar_ends_at_the_budget_too() -> None:
    rule = Dvar(steps=25, check_every_steps=10, window=3, variance_ratio=0.5)
    assert [step for step in range(1, 27) if rule.due(step)] == [10, 20, 25, 26]
    falling = [EvalLoss(10, 3.0), EvalLoss(20, 2.0), EvalLoss(25, 1.0)]
    assert not rule.stops(curve(20), falling)
    assert rule.stops(curve(25), falling)


def test_the_configuration_names_the_rule() -> None:
    assert stop_rule_from_config(InversionConfig(steps=7)) == Budget(7)
    stop = StopConfig(method="dvar", check_every_steps=5, window=4, variance_ratio=0.3)
    assert stop_rule_from_config(InversionConfig(steps=7, stop=stop)) == Dvar(7, 5, 4, 0.3)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (StopConfig(check_every_steps=3), []),
        (StopConfig(check_every_steps=3, method="dvar"), [3, 6, 7]),
        (StopConfig(check_every_steps=3, keep_best=True), [3, 6, 7]),
    ],
)
def test_the_frozen_batch_is_looked_at_only_if_somebody_asks(stop: StopConfig, expected: list[int]) -> None:
    config = InversionConfig(steps=7, stop=stop)
    assert [step for step in range(1, 8) if is_eval_step(config, step)] == expected
