"""Send what a command logs to its tracker, on a thread of the driver.

The command waits for no tracker: what is logged goes to a queue. A tracker that fails is told of once and left alone.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.report.page import flatten
from pipeline.store.addresses import is_local, open_filesystem
from pipeline.store.errors import describe_error
from pipeline.store.redact import redacted
from pipeline.store.storage import RunStore
from pipeline.times import now
from pipeline.tracking.clients import Tracker, start_tracker

log = logging.getLogger(__name__)

FOLDER = "tracking"
"""Folder of the output that has the files of a tracker."""

WAIT_S, STOPPED_WAIT_S = 120.0, 10.0
"""Longest waits for the tracker, in seconds: at the end of a command, and of one that was told to stop."""

_MOST_WAITING = 10_000
"""Entries that wait for the tracker; those beyond are not logged."""

Entry = Callable[[Tracker], None]
"""Call that logs something to the tracker."""


class Sender:
    """The thread that logs to a command's tracker, whose run begins with the first entry."""

    def __init__(self, config: RunConfig, store: RunStore) -> None:
        self._config = config
        self._store = store
        self._waiting: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_broken = False
        self._num_lost = 0

    def send(self, entry: Entry) -> None:
        """Log an entry, later, in the order of the calls."""
        if self._config.tracking == "none" or self._is_broken:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(entry)
        else:
            self._num_lost += 1

    def close(self, seconds: float) -> None:
        """Wait until everything is logged, for so many seconds at most; say what is not."""
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("tracking = %s did not end in time; its run may be incomplete", self._config.tracking)
        if self._num_lost:
            log.warning("%d entries were not logged: tracking = %s is too slow", self._num_lost, self._config.tracking)

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="tracking-") as temporary:
                filesystem, path = open_filesystem(self._store.root)
                if is_local(filesystem):
                    self._log_all(f"{path}/{FOLDER}")
                else:
                    self._log_all(f"{temporary}/{FOLDER}")
                    self._upload(Path(temporary))
        except Exception as error:  # a client may raise anything, and none of it ends the run
            self._is_broken = True
            log.warning(
                "tracking = %s failed, nothing more is logged: %s", self._config.tracking, describe_error(error)
            )

    def _log_all(self, folder: str) -> None:
        settings = dict(flatten(redacted(shown_tree(self._config))))
        tracker = start_tracker(self._config.tracking, now().replace(":", ""), folder, settings)
        try:
            while (entry := self._waiting.get()) is not None:
                entry(tracker)
        finally:
            tracker.close()

    def _upload(self, folder: Path) -> None:
        """Put the tracker's files into an output that is no disk."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._store.put(path.relative_to(folder).as_posix(), path.read_bytes())
