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


class Causes:
    """Groups of failures, made one by one: two causes that differ only in numbers or in the concept's id are one."""

    def __init__(self) -> None:
        self._groups: dict[str, Cause] = {}

    def add(self, name: str, concept_id: str, cause: str) -> None:
        """`concept_id`: empty for what is no concept's."""
        alike = re.sub(r"\d+", "#", cause.replace(concept_id, "…") if concept_id else cause)
        before = self._groups.get(alike, Cause(cause, (), 0))
        names = (*before.names, name) if before.count < _MAX_NAMES else before.names
        self._groups[alike] = Cause(before.cause, names, before.count + 1)

    def ranked(self) -> list[Cause]:
        """Most frequent first."""
        return sorted(self._groups.values(), key=lambda cause: -cause.count)


def by_cause(failures: Iterable[tuple[str, str, str]]) -> list[Cause]:
    """(name, concept id or "", cause) of each failure -> groups, most frequent first."""
    causes = Causes()
    for failure in failures:
        causes.add(*failure)
    return causes.ranked()
