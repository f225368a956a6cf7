from __future__ import annotations

import pytest

from pipeline.bounds import largest_number, parse_bound


@pytest.mark.parametrize(
    ("text", "total", "largest"), [("7%", 100, 7), ("1%", 199, 1), ("0.5 %", 1000, 5), ("20", 7, 20), (3, 100, 3)]
)
def test_shares_and_counts(text: str | int, total: int, largest: int) -> None:
    assert largest_number(parse_bound("--bound", text), total) == largest


@pytest.mark.parametrize("text", ["1 percent", "101%", -1, "-1", True, "", "1.5"])
def test_other_texts_are_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="--bound"):
        parse_bound("--bound", text)
