from __future__ import annotations

import re
from pathlib import Path

from pipeline import exit_codes

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "OPERATIONS.md"


def test_the_manual_lists_every_code() -> None:
    table = dict(re.findall(r"^\| (\d+) \| `([A-Z]+)` \|", _PAGE.read_text(), re.MULTILINE))
    declared = {str(value): name for name, value in vars(exit_codes).items() if isinstance(value, int)}
    assert table == declared
