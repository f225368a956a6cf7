"""Errors that end an actor, a run or an attempt at a concept, and the text of any error in one line."""

from __future__ import annotations

import re

from pipeline.store.redact import foreign_text, redact
from textual_inversion.errors import LOST_WORKER, ErrorKind


class ActorBroken(RuntimeError):
    """An actor can do nothing more and must be replaced."""

    def __init__(self, text: str, kind: ErrorKind = LOST_WORKER) -> None:
        super().__init__(text)
        self.kind: ErrorKind = kind
        """`bug` if this software broke the actor, `lost_worker` if its device, memory or process did."""


class ActorLeaving(Exception):
    """The node of an actor is taken back, and the actor has not begun the concept."""


class StoreFailed(OSError):
    """The run's own storage does not answer, or refuses, again and again; no concept can be blamed."""


class PhotosUnreachable(OSError):
    """A concept's photos cannot be fetched for now; another attempt may succeed."""


class InputChanged(Exception):
    """A photo or mask is not what the concept's fingerprint was made from; the concept must be planned anew."""


class RunAborted(RuntimeError):
    """The run cannot go on for a reason that no concept can be blamed for; the text names the reason."""


class StorageLost(RunAborted):
    """The run cannot go on because its own storage fails; the same command continues it."""


class ClusterLost(RunAborted):
    """The run cannot go on because its cluster brings no actor; the same command continues it where there is one."""


_DIED = "its process ended without a word: killed, out of memory, or crashed (a log of its node says which)"
_CLIENTS = ("botocore", "aiobotocore", "google", "gcsfs", "azure", "adlfs", "aiohttp")
"""Packages of object stores' clients, whose errors need not be OSErrors."""


MAX_LINE_CHARACTERS = 4000
"""Longest text of an error that a command prints; a server or a file may make it any length."""


def one_line(text: str) -> str:
    """Return a text as one line that a terminal can print, without credentials: control characters as their escapes,
    and cut at `MAX_LINE_CHARACTERS`."""
    line = re.sub(r"\s*\n\s*", " ", redact(text).strip())
    if not line.isprintable():
        line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:MAX_LINE_CHARACTERS]}... ({len(line):,} characters)"


def printable_lines(text: str) -> str:
    """Return a text of several lines with each as a terminal can print it, indentation kept; see `one_line`."""
    lines = text.split("\n")
    return "\n".join(f"{line[: len(line) - len(line.lstrip(' '))]}{one_line(line)}" for line in lines)


def is_client_error(error: BaseException) -> bool:
    """Return whether an object store's client raised the error, for example because it has no credentials."""
    return type(error).__module__.partition(".")[0] in _CLIENTS


def describe_error(error: BaseException) -> str:
    """Return the error's type and the line of its text that says what happened (`foreign_text`)."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what an actor raised in an error of its own
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    if type(cause).__name__ == "ActorDiedError" and "connection error code 2" in str(cause):
        return f"ActorDiedError: {_DIED}"  # Ray's own text says no more, in many words
    # Ray puts a remote traceback in the text; its last line is the error itself. Its own errors begin with the reason.
    is_traceback = any(line.startswith("Traceback") or "ray::" in line for line in lines)
    return foreign_text(f"{type(cause).__name__}: {lines[-1] if is_traceback else lines[0]}")


def describe_bug(error: BaseException) -> str:
    """Return one line for an unforeseen exception: that it is a bug, its type and its text."""
    return f"bug in this software, not a fault of the concept: {describe_error(error)}"
