"""What ends an actor or a run, and any error in one line."""

from __future__ import annotations

from pipeline.store.redact import redact


class ActorBroken(RuntimeError):
    """Raised by an actor that can do nothing more and must be replaced."""


class ActorLeaving(Exception):
    """Raised by an actor whose node is taken back, for a concept that it has not begun."""


class StoreFailed(OSError):
    """The run's own storage does not answer, or refuses, again and again; no concept can be blamed."""


class PhotosUnreachable(OSError):
    """A concept's photos cannot be had for now; another attempt may mend it."""


class RunAborted(RuntimeError):
    """Actors fail for reasons that no concept can be blamed for; the text says which."""


_DIED = "its process ended without a word: killed, out of memory, or crashed (a log of its node says which)"


def describe_error(error: BaseException) -> str:
    """The kind of error and the line of its text that says what happened."""
    cause = getattr(error, "cause", None) or error  # what an actor raised, inside Ray's own error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    if type(cause).__name__ == "ActorDiedError" and "connection error code 2" in str(cause):
        return f"ActorDiedError: {_DIED}"  # all that Ray tells, in its own many words
    # Ray puts a remote traceback in the text; its last line is the error itself. Its own errors begin with the reason.
    is_traceback = any(line.startswith("Traceback") or "ray::" in line for line in lines)
    return redact(f"{type(cause).__name__}: {lines[-1] if is_traceback else lines[0]}")
