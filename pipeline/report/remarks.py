"""Remarks of a dry run, grouped by cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|<[^<>\s]+>|\d+")
"""Quoted texts, placeholder tokens and numbers, in which two remarks with one cause may differ."""


@dataclass(slots=True)
class _Group:
    """Remarks with one cause."""

    remarks: list[tuple[str, str]] = field(default_factory=list)
    """The first ones, as name and text."""
    count: int = 0


def grouped(remarks: Iterable[tuple[str, str]], most: int) -> Iterator[str]:
    """Yield a line for each remark, given as name and text; one line for all with one cause if they are more than
    `most`, with their number and the first `most` names. An empty name is left out.

    Two remarks have one cause if they differ only in quoted texts, placeholder tokens, numbers and their names.
    """
    groups: dict[str, _Group] = {}
    for name, text in remarks:
        group = groups.setdefault(_VALUE.sub("…", text.replace(name, "…") if name else text), _Group())
        group.count += 1
        if group.count <= most:
            group.remarks.append((name, text))
    for group in groups.values():
        if group.count <= most:
            yield from (f"{name}: {text}" if name else text for name, text in group.remarks)
        else:
            names = ", ".join(name for name, _ in group.remarks)
            yield f"{group.count:,} times ({names} and {group.count - most:,} more), the first: {group.remarks[0][1]}"
