"""Checks of settings on construction. Standard library only."""

from __future__ import annotations

from typing import get_args


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError, naming the field, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {rule}")


def require_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError, naming the field and its value, unless the value is one of the Literal type `choices`."""
    *others, last = (repr(choice) for choice in get_args(choices))
    require(value in get_args(choices), name, value, f"{', '.join(others)} or {last}")
