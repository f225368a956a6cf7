"""A mean with its 95 % confidence interval, Student's t interval (Student 1908)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
"""Coverage of every interval."""

_MANY = 2000
"""Degrees of freedom from which on the normal distribution is taken: the intervals differ by less than a thousandth."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of n values, with half the width of its 95 % confidence interval, which is None for a single value."""

    mean: float
    half_width: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Interval | None:
        """Return the interval of the values that are known, or None if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        if len(known) == 1:
            return cls(known[0], None, 1)
        quantile = t_quantile(len(known) - 1)
        return cls(fmean(known), quantile * stdev(known) / len(known) ** 0.5, len(known))

    @property
    def sign(self) -> int:
        """Sign of the mean where the interval excludes 0, else 0."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return format(self)

    def __format__(self, form: str) -> str:
        """Format the interval by `[+][.digits]`: with `+`, means that are not negative get a plus sign; the digits
        after the point are three by default."""
        sign, _, digits = form.partition(".")
        precision = f".{digits or 3}f"
        return f"{self.mean:{sign}{precision}}" + (
            f" ± {self.half_width:{precision}}" if self.half_width is not None else ""
        )


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return t for which Student's distribution holds `level` between -t and t; `degrees` of freedom, 1 or more."""
    if degrees > _MANY:
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the angle's interval down to a double's precision
        middle = (low + high) / 2
        if _coverage(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _coverage(angle: float, degrees: int) -> float:
    """Return the share of Student's distribution between -t and t, with `angle` = arctan(t / sqrt(degrees)).

    Abramowitz and Stegun 1964, 26.7.3 for an odd number of degrees and 26.7.4 for an even one.
    """
    cosine = math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(1 if is_odd else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
