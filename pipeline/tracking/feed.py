"""Log the concepts of a run to its tracker, from their records and files, and the learning curve of a training.

Actors and workers know no tracker and need no network for one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial

from pipeline.config import RunConfig
from pipeline.ledger.records import ConceptRecord
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from pipeline.tracking.clients import Tracker
from pipeline.tracking.sender import Sender

_MOST_POINTS = 100
"""Points of a logged curve; each is the mean of as many steps."""


class TrackerFeed:
    """The concepts of one run on their way to its tracker."""

    def __init__(self, config: RunConfig, store: RunStore) -> None:
        self._most_shown = config.report.tracked
        self._store = store
        self._sender = Sender(config, store)
        self._num_ended = 0
        self._num_failed = 0

    def add(self, record: ConceptRecord) -> None:
        """Log a concept that has ended, later."""
        self._sender.send(partial(self._log, record))

    def close(self, seconds: float) -> None:
        """Wait until everything is logged, for so many seconds at most; say what is not."""
        self._sender.close(seconds)

    def _log(self, record: ConceptRecord, tracker: Tracker) -> None:
        self._num_ended += 1
        self._num_failed += record.status == "failed"
        tracker.log_values(self._num_ended, self._values(record))
        if record.status != "done" or self._num_ended - self._num_failed > self._most_shown:
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


class CurveFeed:
    """The learning curve of an encoder's training on its way to the training's tracker."""

    def __init__(self, config: RunConfig, store: RunStore) -> None:
        self._sender = Sender(config, store)
        self._last_step = 0

    def update(self, curve: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log those points (step, name -> value) of the curve that lie behind the last logged one, later."""
        for step, values in curve:
            if step > self._last_step:
                self._last_step = step
                finite = {name: value for name, value in values.items() if math.isfinite(value)}
                self._sender.send(partial(_log_point, step, finite))

    def close(self, seconds: float) -> None:
        """Wait until everything is logged, for so many seconds at most; say what is not."""
        self._sender.close(seconds)


def _log_point(step: int, values: Mapping[str, float], tracker: Tracker) -> None:
    tracker.log_values(step, values)


def curve_points(data: bytes) -> Sequence[tuple[int, float]]:
    """Return (step, loss) of a curve's Parquet, at most a hundred: the means of equally many steps in turn."""
    table = read_table(io.BytesIO(data), ("step", "loss"))
    rows = list(zip(table["step"].to_pylist(), table["loss"].to_pylist(), strict=True))
    per_point = max(1, math.ceil(len(rows) / _MOST_POINTS))
    parts = [rows[start : start + per_point] for start in range(0, len(rows), per_point)]
    means = [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
    return [(step, loss) for step, loss in means if math.isfinite(loss)]
