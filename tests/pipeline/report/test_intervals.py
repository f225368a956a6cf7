"""A mean's interval against Student's table and against scipy."""

from __future__ import annotations

import pytest
from scipy.special import stdtrit

from pipeline.report.intervals import Interval, t_quantile


def test_students_interval() -> None:
    # t(0.975) of 2 degrees of freedom is 4.302653, of 15 it is 2.131450 (Student's table)
    assert Interval.of([1.0, 2.0, 3.0]) == Interval(2.0, pytest.approx(4.302653 / 3**0.5), 3)
    sixteen = Interval.of([0.0, 2.0] * 8)
    assert sixteen is not None
    assert sixteen.half_width == pytest.approx(2.131450 * (16 / 15) ** 0.5 / 4, abs=1e-6)
    assert Interval.of([0.5, None]) == Interval(0.5, None, 1)
    assert Interval.of([None]) is None


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 100, 1001, 2001, 100_000])
def test_quantiles_are_those_of_students_distribution(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stdtrit(degrees, 0.975), rel=1e-3 if degrees > 2000 else 1e-9)
    assert t_quantile(degrees, 0.5) == pytest.approx(stdtrit(degrees, 0.75), rel=1e-3 if degrees > 2000 else 1e-9)


def test_the_sign_is_known_where_the_interval_excludes_zero() -> None:
    signs = [Interval(0.3, 0.2, 5), Interval(-0.3, 0.2, 5), Interval(0.1, 0.2, 5), Interval(0.1, None, 1)]
    assert [each.sign for each in signs] == [1, -1, 0, 0]
    assert f"{signs[0]:+} and {signs[1]}" == "+0.300 ± 0.200 and -0.300 ± 0.200"
    assert f"{signs[0]:+.1} and {signs[3]:.2}" == "+0.3 ± 0.2 and 0.10"
