"""Failures of a run, grouped by the kind of the error and then by its cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from textual_inversion.errors import BAD_INPUT, BUG, LOST_WORKER, NUMERICS, STORAGE

STAGE = "stage"
"""Kind of an error that ended a stage of the run; it is no concept's."""

UNKNOWN = "unknown"
"""Kind of failures in records that name none: an earlier release wrote them."""

_MAX_NAMES = 200

_TITLES_AND_REMEDIES = {
    BAD_INPUT: ("bad input", "correct the row, photos, masks or texts that the cause names, then run again"),
    NUMERICS: ("numbers that are not finite", "lower inversion.learning_rate or look at the photos, then run again"),
    LOST_WORKER: (
        "lost worker",
        "run again; a concept that loses its worker every time needs more memory than the worker has, or more time "
        "than actors.stall_s",
    ),
    STORAGE: ("storage", "check the store's address, rights and credentials, then run again"),
    BUG: (
        "bug in this software",
        "report it with the traceback in the concept's log.jsonl; the input is not at fault",
    ),
    STAGE: ("stage of the run", "remove the cause, then run again: what is done is not repeated"),
    UNKNOWN: ("unknown kind", "run again: these records are of an earlier release, which kept no kinds"),
}


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures of one kind with one cause."""

    kind: str
    """An error kind of `textual_inversion.errors`, `STAGE` or `UNKNOWN`."""

    cause: str
    """The error of the first failure."""

    names: tuple[str, ...]
    """Names of the first 200 failures."""

    count: int


@dataclass(frozen=True, slots=True)
class KindGroup:
    """Failures of one kind."""

    kind: str
    title: str
    remedy: str
    count: int
    causes: tuple[Cause, ...]
    """The most frequent causes first; some may be left out."""


class Failures:
    """Failures taken in one by one.

    Two errors of a kind have the same cause if they differ only in numbers and in the concept's id.
    """

    def __init__(self) -> None:
        self._causes: dict[tuple[str, str], Cause] = {}

    def add(self, kind: str, name: str, concept_id: str, error: str) -> None:
        """Add a failure. `kind` is empty where its record names none, `concept_id` where it is no concept's."""
        kind = kind or UNKNOWN
        pattern = re.sub(r"\d+", "#", error.replace(concept_id, "…") if concept_id else error)
        before = self._causes.get((kind, pattern), Cause(kind, error, (), 0))
        names = (*before.names, name) if before.count < _MAX_NAMES else before.names
        self._causes[kind, pattern] = Cause(kind, before.cause, names, before.count + 1)

    def causes(self) -> list[Cause]:
        """Return the causes, the most frequent first."""
        return sorted(self._causes.values(), key=lambda cause: -cause.count)


def title_of(kind: str) -> str:
    """Return a kind's name for a person."""
    return _TITLES_AND_REMEDIES[kind][0] if kind in _TITLES_AND_REMEDIES else kind.replace("_", " ")


def remedy_of(kind: str) -> str:
    """Return what to do about failures of a kind."""
    return _TITLES_AND_REMEDIES.get(kind, _TITLES_AND_REMEDIES[UNKNOWN])[1]


def group_by_kind(causes: Iterable[Cause], max_causes: int) -> list[KindGroup]:
    """Group causes by kind, the kind with the most failures first.

    The groups hold the `max_causes` most frequent causes in all; their counts are of all failures of the kind.
    """
    ranked = sorted(causes, key=lambda cause: -cause.count)
    counts: dict[str, int] = {}
    for cause in ranked:
        counts[cause.kind] = counts.get(cause.kind, 0) + cause.count
    shown: dict[str, list[Cause]] = {}
    for cause in ranked[:max_causes]:
        shown.setdefault(cause.kind, []).append(cause)
    return [
        KindGroup(kind, title_of(kind), remedy_of(kind), counts[kind], tuple(shown[kind]))
        for kind in sorted(shown, key=lambda kind: -counts[kind])
    ]


def find_causes(failures: Sequence[tuple[str, str, str, str]]) -> list[Cause]:
    """Return the causes of (kind, name, concept id, error) failures, the most frequent first."""
    found = Failures()
    for failure in failures:
        found.add(*failure)
    return found.causes()
