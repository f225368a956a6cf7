"""Progress lines of a stage: one line that is rewritten in a terminal, and a new line now and then in a job's log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from pipeline.config import LogFormat
from pipeline.report.logs import json_line
from pipeline.times import format_clock

_BEAT_S = 60.0
_TERMINAL_INTERVAL_S = 0.5
_LOG_INTERVAL_S = 30.0

Counts = Mapping[str, int]
ProgressNumbers = Mapping[str, float]
"""The numbers of a progress line: `done`, `failed`, `total`, `seconds` so far, the counts that `update` was given, and
`per_minute` and `seconds_left` once something is done or failed."""


class Progress:
    """Progress of one stage: counts, rate and remaining time."""

    def __init__(
        self,
        stage: str,
        total: Callable[[], int],
        *,
        stream: TextIO | None = None,
        interval_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] | None = None,
        log_format: LogFormat = "text",
        observe: Callable[[ProgressNumbers], None] | None = None,
    ) -> None:
        """Start with nothing done.

        total: number of rows; called for every line, because the plan may still be read.
        interval_s: least time between two lines, by default 0.5 s in a terminal and 30 s elsewhere.
        beat: called by the first update and then every minute.
        observe: called by every update.
        """
        self._stage = stage
        self._total = total
        self._clock = clock
        self._beat = beat
        self._last_beat = -math.inf
        self._observe = observe
        self._stream = sys.stderr if stream is None else stream
        self._as_json = log_format == "json"
        self._rewrites = self._stream.isatty() and not self._as_json
        default_s = _TERMINAL_INTERVAL_S if self._rewrites else _LOG_INTERVAL_S
        self._interval_s = default_s if interval_s is None else interval_s
        self._began = clock()
        self._last_line = -math.inf
        self._width = 0

    def update(
        self, *, done: int, failed: int = 0, running: str = "", final: bool = False, counts: Counts | None = None
    ) -> None:
        """Report the counts so far. Writes a line if the previous one is old enough, and always if `final`.

        `running` and `counts` describe the work under way, one in words and one in numbers.
        """
        now = self._clock()
        if self._beat is not None and now - self._last_beat >= _BEAT_S:
            self._last_beat = now
            self._beat()
        is_due = final or now - self._last_line >= self._interval_s
        if not is_due and self._observe is None:
            return
        numbers = self._numbers(done, failed, counts or {}, now - self._began)
        if self._observe is not None:
            self._observe(numbers)
        if is_due:
            self._last_line = now
            self._write(numbers, running, final)

    def _numbers(self, done: int, failed: int, counts: Counts, seconds: float) -> dict[str, float]:
        numbers = {"done": done, "failed": failed, "total": self._total(), **counts, "seconds": round(seconds, 1)}
        if done + failed and seconds > 0:
            numbers["per_minute"] = 60 * (done + failed) / seconds
            numbers["seconds_left"] = max(0, numbers["total"] - done - failed) * seconds / (done + failed)
        return numbers

    def _write(self, numbers: ProgressNumbers, running: str, final: bool) -> None:
        line = self._line(numbers, running)
        if self._as_json:
            rounded = {name: round(value, 1) for name, value in numbers.items()}
            self._stream.write(json_line(line, logger="progress", facts={"stage": self._stage, **rounded}) + "\n")
        elif self._rewrites:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if final else ""))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, numbers: ProgressNumbers, running: str) -> str:
        parts = [f"{self._stage}: {numbers['done']}/{numbers['total']} done"]
        if numbers["failed"]:
            parts.append(f"{numbers['failed']} failed")
        if running:
            parts.append(running)
        parts.append(f"{format_clock(numbers['seconds'])} so far")
        if "per_minute" in numbers:
            parts.append(f"{numbers['per_minute']:.1f}/min")
        if numbers.get("seconds_left"):
            parts.append(f"about {format_clock(numbers['seconds_left'])} left")
        return ", ".join(parts)
