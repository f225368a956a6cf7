"""Failures grouped by cause, as the page and the status show them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MAX_NAMES = 200


@dataclass(frozen=True, slots=True)
class Cause:
    """All that failed for one cause, told in the words of the first."""

    cause: str
    names: tuple[str, ...]
    """Of the first 200."""
    count: int


def by_cause(failures: Iterable[tuple[str, str, str]]) -> list[Cause]:
    """(name, concept id or "", cause) of each failure -> groups, most frequent first: two causes that differ only in
    numbers or in the concept's id are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, concept_id, cause in failures:
        alike = re.sub(r"\d+", "#", cause.replace(concept_id, "…") if concept_id else cause)
        groups.setdefault(alike, []).append((name, cause))
    causes = [
        Cause(group[0][1], tuple(name for name, _ in group[:_MAX_NAMES]), len(group)) for group in groups.values()
    ]
    return sorted(causes, key=lambda cause: -cause.count)
