"""Decide how an exception ends a concept in an actor: as a failure of the concept alone, or as one for the driver."""

from __future__ import annotations

import logging
import re
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.store.errors import (
    ActorBroken,
    ActorLeaving,
    InputChanged,
    PhotosUnreachable,
    RunAborted,
    StoreFailed,
    describe_bug,
    describe_error,
    is_client_error,
)
from pipeline.store.trouble import describe_trouble
from textual_inversion.errors import BUG, LOST_WORKER, ConceptError, ErrorKind

log = logging.getLogger(__name__)

_DEVICE_ERROR = re.compile(r"\b(CUDA|cuDNN|cuBLAS|HIP)( driver| runtime)? error\b")
_ACCELERATOR_ERROR: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()  # since torch 2.8
)


@dataclass(frozen=True, slots=True)
class ConceptFailure:
    """The end of a concept that failed while its actor goes on."""

    kind: ErrorKind
    text: str
    """One line for the record."""
    trace: str = ""
    """Python traceback of a bug, for the concept's log."""


def failure_of(error: Exception, log_uri: str) -> ConceptFailure:
    """Return how the exception ends its concept; `log_uri` is where the concept's log is.

    Raises the error again, or an ActorBroken or StoreFailed in its place, if the driver is to decide instead.
    """
    if isinstance(error, ConceptError):
        return ConceptFailure(error.kind, str(error))
    if isinstance(error, ActorBroken | ActorLeaving | InputChanged | PhotosUnreachable | RunAborted | StoreFailed):
        raise error
    if is_device_error(error):
        raise broken_by(error) from error
    if isinstance(error, OSError) or is_client_error(error):
        raise StoreFailed(f"on {socket.gethostname()}: {describe_trouble(error)}") from error
    return ConceptFailure(BUG, f"{bug_text(error)}; the traceback is in {log_uri}", trace_of(error))


def trace_of(error: BaseException) -> str:
    """Return the Python traceback of an exception, with those of its causes."""
    return "".join(traceback.format_exception(error))


def bug_text(error: Exception) -> str:
    """Return one line for an unforeseen exception: that it is a bug, its type and text, and the line of code."""
    return f"{describe_bug(error)}{_place(error)}"


def broken_by(error: BaseException) -> ActorBroken:
    """Return the ActorBroken, with the exception as its cause, for one that leaves an actor unable to go on."""
    is_bug = isinstance(error, Exception) and not is_device_error(error)
    broken = ActorBroken(f"{describe_error(error)}{_place(error)}", BUG if is_bug else LOST_WORKER)
    broken.__cause__ = error
    return broken


def _place(error: BaseException) -> str:
    """Return file and line of the code that raised the exception, in brackets after a space; empty if never raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def is_device_error(error: BaseException) -> bool:
    """Return whether the device or its memory failed: out of memory, or lost. torch has no type of its own for all."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, *_ACCELERATOR_ERROR)):
        return True
    return isinstance(error, RuntimeError) and _DEVICE_ERROR.search(str(error)) is not None


def logged_as_bug(error: Exception) -> str:
    """Log the traceback of an unforeseen exception of the bulk stages and return the error of the row that it ends.

    Raises the exception again if the device is lost or has no memory, as no row is to blame.
    """
    if is_device_error(error):
        raise error
    log.error("a row failed", exc_info=error)
    return bug_text(error)
