"""Keep a log of each concept beside its results: JSON lines, attempt after attempt.

A cluster's own logs go with its pods; this log stays, and says where each attempt ran and how far it came.
"""

from __future__ import annotations

import logging
import os
import socket
import threading

from pipeline.report.logs import json_line
from pipeline.store.errors import is_client_error
from pipeline.store.redact import redacted
from pipeline.store.storage import ConceptFolder, RunStore

log = logging.getLogger(__name__)

_MOST_BYTES = 256 * 1024
"""Bytes of earlier attempts' lines that are kept: a concept that fails every night must not grow its log for ever."""


class ConceptLog:
    """Log of one attempt, appended to those of earlier attempts. May be used on any thread.

    A log that cannot be stored does not end the attempt; this process's own log says so.
    """

    def __init__(self, store: RunStore, folder: ConceptFolder, attempt: int) -> None:
        self._store = store
        self._path = folder.log
        self._earlier: bytes | None = None
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self.note("begins", attempt=attempt, host=socket.gethostname(), process=os.getpid())

    def mark_new(self) -> None:
        """Take note that no earlier attempt has stored a log, so that none is read."""
        self._earlier = b""

    def note(self, what: str, **facts: object) -> None:
        """Add a line, which the next `store` stores."""
        self._lines.append(json_line(what, logger="concept", facts=redacted(facts)))

    def store(self, what: str, **facts: object) -> None:
        """Add a line and store all lines."""
        self.note(what, **facts)
        with self._lock:
            try:
                if self._earlier is None:
                    self._earlier = self._read()
                self._store.put(self._path, self._earlier + "".join(f"{line}\n" for line in self._lines).encode())
            except Exception as error:
                if not (isinstance(error, OSError) or is_client_error(error)):
                    raise
                log.warning("%s was not stored: %s", self._store.uri(self._path), error)

    def _read(self) -> bytes:
        try:
            found = self._store.get(self._path)
        except FileNotFoundError:
            return b""
        return found if len(found) <= _MOST_BYTES else found[-_MOST_BYTES:].partition(b"\n")[2]
