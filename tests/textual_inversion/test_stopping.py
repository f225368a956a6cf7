from __future__ import annotations

from textual_inversion.stopping import Budget, CurvePoint


def test_a_budget_ends_at_its_last_step() -> None:
    rule = Budget(3)
    curve = [CurvePoint(step, 0.5, 0.4) for step in (1, 2, 3)]
    assert [rule.due(step) for step in range(5)] == [False, False, False, True, True]
    assert rule.stops(curve)
    assert not rule.stops(curve[:2])
