"""Keep from the terminal what Ray Data says about its own work; Ray's session folder has all of it."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HARMLESS = re.compile(rb"\[[^\n]* E \d+ \d+\] core_worker\.cc:\d+: Actor with class name: [^\n]*/issues/53727[^\n]*\n")
"""Line of Ray's core about every actor pool of Ray Data: arguments in the object store may go out of scope before an
actor is restarted. Ray Data holds them as long as the pool. No setting of Ray turns the line off."""

_MAY_HANG = "does not have any available CPUs"
"""Part of Ray Data's warning, as it begins, that no core is free and that it may hang. A core that other work holds for
a moment is no reason to warn; the stage says by itself when it waited long for one (`stage.py`)."""

_JOIN_S = 5.0


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data's lines about itself from stderr in the block; its warnings and errors are shown, but for one."""
    import ray.data  # which makes the handlers: a process that has not used it has none to quiet

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    dataset = logging.getLogger("ray.data.dataset")
    dataset.addFilter(_is_worth_showing)
    try:
        with _without(_HARMLESS):
            yield
    finally:
        dataset.removeFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return _MAY_HANG not in record.getMessage()


@contextmanager
def _without(harmless: re.Pattern[bytes]) -> Iterator[None]:
    """Drop what matches from what native code writes to stderr. Python's own `sys.stderr` goes past the filter, so that
    nothing of it waits in a pipe when the process is ended."""
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    if _is_native(before):
        sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, encoding=before.encoding, errors=before.errors)

    def forward() -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe, os.fdopen(terminal, "wb", buffering=0) as shown:
            while data := pipe.read(65536):
                shown.write(harmless.sub(b"", data))

    filtering = threading.Thread(target=forward, name="stderr", daemon=True)
    filtering.start()
    try:
        yield
    finally:
        if sys.stderr is not before:
            sys.stderr.close()
            sys.stderr = before
        before.flush()
        end = os.dup(terminal)
        os.dup2(end, 2)  # closes the pipe's last writer, and so ends the thread
        os.close(end)
        filtering.join(_JOIN_S)


def _is_native(stream: object) -> bool:
    """Return whether a stream writes to the process's stderr, and not to a test's or an application's capture."""
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return False
