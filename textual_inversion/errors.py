"""Kinds of error that end a concept, and the exceptions that end one concept and no other."""

from __future__ import annotations

from typing import ClassVar, Literal

ErrorKind = Literal["bad_input", "numerics", "lost_worker", "storage", "bug"]

BAD_INPUT: ErrorKind = "bad_input"
"""The concept's row, photos, masks or texts cannot be used as they are, or do not go with the settings or the model."""
NUMERICS: ErrorKind = "numerics"
"""A loss, a gradient or a latent is not finite."""
LOST_WORKER: ErrorKind = "lost_worker"
"""The process or the device that learned the concept was lost, or did not answer in time."""
STORAGE: ErrorKind = "storage"
"""A store did not answer, or refused, again and again."""
BUG: ErrorKind = "bug"
"""A mistake in this software; neither the concept nor the cluster is to blame."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, as a part of another one-line text, with what cannot be printed as
    escapes; the exception's type if it has no text."""
    line = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


class ConceptError(ValueError):
    """An error that ends one concept and does not touch the others; subclasses name its kind."""

    kind: ClassVar[ErrorKind]


class BadInput(ConceptError):
    """Input of a concept that cannot be used; the text says what is wrong and what to do."""

    kind = BAD_INPUT


class BadCheckpoint(ConceptError):
    """A stored state that does not fit its concept; the text says what to delete."""

    kind = STORAGE


class NotFinite(ConceptError):
    """Numbers of a concept that are not finite."""

    kind = NUMERICS
