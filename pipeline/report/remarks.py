"""Remarks of a dry run, grouped by cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|<[^<>\s]+>|\d+")
"""Quoted texts, placeholder tokens and numbers, in which two remarks with one cause may differ."""

_MAX_VALUES = 12


@dataclass(slots=True)
class _Group:
    """Remarks with one cause."""

    remarks: list[tuple[str, str]] = field(default_factory=list)
    """The first ones, as name and text."""
    count: int = 0
    values: dict[str, None] = field(default_factory=dict)
    """The first value of each remark in which they may differ, in their order and each once."""


def grouped(remarks: Iterable[tuple[str, str]], most: int) -> Iterator[str]:
    """Yield a line for each remark, given as name and text; one line for all with one cause if they are more than
    `most`, with their number, the first `most` names, and the values other than the first one's. An empty name is left
    out.

    Two remarks have one cause if they differ only in quoted texts, placeholder tokens, numbers and their names.
    """
    groups: dict[str, _Group] = {}
    for name, text in remarks:
        group = groups.setdefault(_VALUE.sub("…", text.replace(name, "…") if name else text), _Group())
        group.count += 1
        if value := _VALUE.search(text):
            group.values[value[0]] = None
        if group.count <= most:
            group.remarks.append((name, text))
    for group in groups.values():
        if group.count <= most:
            yield from (f"{name}: {text}" if name else text for name, text in group.remarks)
        else:
            names = ", ".join(name for name, _ in group.remarks)
            others = list(group.values)[1:]
            also = f"; also {', '.join(others[:_MAX_VALUES])}" if others else ""
            also += f" and {len(others) - _MAX_VALUES:,} more" if len(others) > _MAX_VALUES else ""
            begin = f"{group.count:,} times ({names} and {group.count - most:,} more), the first"
            yield f"{begin}: {group.remarks[0][1]}{also}"
