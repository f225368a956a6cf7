"""Log the concepts of a run to its tracker, from their records and files, on a thread of the driver.

Actors know no tracker and need no network for one. The run waits for none: records go to a queue, and a tracker that
fails is logged once and left alone.
"""

from __future__ import annotations

import io
import logging
import math
import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.ledger.records import ConceptRecord
from pipeline.report.page import flatten
from pipeline.store.addresses import is_local, open_filesystem
from pipeline.store.errors import describe_error
from pipeline.store.parquet import read_table
from pipeline.store.redact import redacted
from pipeline.store.storage import RunStore
from pipeline.times import now
from pipeline.tracking.clients import Tracker, start_tracker

log = logging.getLogger(__name__)

FOLDER = "tracking"
"""Folder of the run's output that has the files of a tracker."""

_MOST_POINTS = 100
"""Points of a logged curve; each is the mean of as many steps."""
_MOST_WAITING = 10_000
"""Records that wait for the tracker; those beyond are not logged."""


class TrackerFeed:
    """The concepts of one run on their way to its tracker, whose run begins with the first of them."""

    def __init__(self, config: RunConfig, store: RunStore) -> None:
        self._config = config
        self._store = store
        self._waiting: queue.SimpleQueue[ConceptRecord | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_broken = False
        self._num_lost = 0
        self._num_ended = 0
        self._num_failed = 0

    def add(self, record: ConceptRecord) -> None:
        """Log a concept that has ended, later."""
        if self._config.tracking == "none" or self._is_broken:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(record)
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
            log.warning("%d concepts were not logged: tracking = %s is too slow", self._num_lost, self._config.tracking)

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
            while (record := self._waiting.get()) is not None:
                self._log(tracker, record)
        finally:
            tracker.close()

    def _log(self, tracker: Tracker, record: ConceptRecord) -> None:
        self._num_ended += 1
        self._num_failed += record.status == "failed"
        tracker.log_concept(self._num_ended, record.concept_id, self._values(record))
        if record.status != "done" or self._num_ended - self._num_failed > self._config.report.tracked:
            return
        folder = record.result
        files = self._store.get_many([folder.curve, folder.grid])
        curve, grid = files[folder.curve], files[folder.grid]
        if isinstance(curve, bytes) and (points := curve_points(curve)):
            tracker.log_curve(record.concept_id, points)
        if isinstance(grid, bytes):
            tracker.log_grid(self._num_ended, record.concept_id, grid)

    def _values(self, record: ConceptRecord) -> Mapping[str, float]:
        values: dict[str, float] = {"concepts/failed": self._num_failed}
        if record.status == "done":
            values |= {"concept/steps": record.steps, "concept/seconds": record.seconds}
            values |= {f"scores/{name}": value for name, value in record.scores.items() if math.isfinite(value)}
        return values

    def _upload(self, folder: Path) -> None:
        """Put the tracker's files into an output that is no disk."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def curve_points(data: bytes) -> Sequence[tuple[int, float]]:
    """Return (step, loss) of a curve's Parquet, at most a hundred: the means of equally many steps in turn."""
    table = read_table(io.BytesIO(data), ("step", "loss"))
    rows = list(zip(table["step"].to_pylist(), table["loss"].to_pylist(), strict=True))
    per_point = max(1, math.ceil(len(rows) / _MOST_POINTS))
    parts = [rows[start : start + per_point] for start in range(0, len(rows), per_point)]
    means = [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
    return [(step, loss) for step, loss in means if math.isfinite(loss)]
