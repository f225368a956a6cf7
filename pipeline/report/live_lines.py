"""Lines at the bottom of a terminal that are rewritten in place, while other output scrolls above them."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO

_ERASE = "\r\x1b[J"


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines of the stream can be rewritten."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class LiveLines:
    """The lines, on one stream. May be used by several threads."""

    def __init__(self, stream: TextIO) -> None:
        """Take over stderr if that is the stream: what others write to it, log lines included, goes above the lines.

        `close` gives it back.
        """
        self._stream = stream
        self._lock = threading.RLock()
        self._num_drawn = 0
        self._handlers: list[logging.StreamHandler[Any]] = []
        if stream is sys.stderr:
            above: TextIO = _Above(self, stream)  # type: ignore[assignment]
            handlers = [*logging.getLogger().handlers, *logging.getLogger("ray").handlers]
            self._handlers = [
                each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is stream
            ]
            for handler in self._handlers:
                handler.setStream(above)
            sys.stderr = above

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the lines by others, each cut to the terminal's width."""
        width = shutil.get_terminal_size().columns
        with self._lock:
            self._stream.write(self._erasing() + "\n".join(line[: max(1, width - 1)] for line in lines))
            self._stream.flush()
            self._num_drawn = len(lines)

    def write_above(self, text: str) -> int:
        """Write text where the lines were; the next `draw` puts them below it."""
        with self._lock:
            self._stream.write(self._erasing() + text)
            self._num_drawn = 0
        return len(text)

    def close(self) -> None:
        """Leave the lines as they are, end the last one, and give stderr back. May be called again."""
        with self._lock:
            if self._num_drawn:
                self._stream.write("\n")
                self._stream.flush()
                self._num_drawn = 0
            for handler in self._handlers:
                handler.setStream(self._stream)
            if self._handlers or isinstance(sys.stderr, _Above):
                sys.stderr = self._stream
            self._handlers = []

    def _erasing(self) -> str:
        """Return what moves the cursor to the begin of the first line and erases all that follows."""
        if not self._num_drawn:
            return ""
        up = f"\x1b[{self._num_drawn - 1}A" if self._num_drawn > 1 else ""
        return f"{up}{_ERASE}"


class _Above:
    """A stream whose writes go above the lines; for all else it is the stream itself."""

    def __init__(self, lines: LiveLines, stream: TextIO) -> None:
        self._lines = lines
        self._under = stream

    def write(self, text: str) -> int:
        return self._lines.write_above(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)
