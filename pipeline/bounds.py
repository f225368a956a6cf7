"""Bounds on a number of things that are given as a share or as a count."""

from __future__ import annotations

import re

from textual_inversion.config_checks import require

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")

Bound = float | int
"""A share, a float from 0 to 1, or a count, an int."""


def parse_bound(name: str, value: int | str) -> Bound:
    """Return the bound of "1%" or of 20. Raises ValueError, naming the option or setting, for any other value."""
    text = str(value).strip()
    share = _SHARE.fullmatch(text)
    is_bound = text.isdecimal() or (share is not None and float(share[1]) <= 100)
    require(is_bound and not isinstance(value, bool), name, value, 'a share such as "1%", or a count such as 20')
    return float(share[1]) / 100 if share else int(text)


def largest_number(bound: Bound, total: int) -> int:
    """Return the largest whole number of `total` things that the bound allows."""
    return bound if isinstance(bound, int) else int(bound * total + 1e-9)  # 7 % of 100 is 7
