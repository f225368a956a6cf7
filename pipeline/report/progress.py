"""How far a stage is: one line that rewrites itself in a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from pipeline.config import LogFormat
from pipeline.report.logs import json_line
from pipeline.times import format_seconds

_BEAT_S = 60.0

Counts = Mapping[str, int]
Facts = Mapping[str, float]
"""What a line tells, as numbers: `done`, `failed`, `total`, `seconds` (so far), the counts that `update` was given, and
as soon as something is settled `per_minute` and `seconds_left`."""


class Progress:
    """Counts of one stage with rate and remaining time."""

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
        observe: Callable[[Facts], None] | None = None,
    ) -> None:
        """`total` is asked at every line, as the plan may still be read. `interval_s`: least time between two lines;
        0.5 s in a terminal and 30 s elsewhere unless given. `beat` is called with the first
        update and every minute of them; `observe` with every one."""
        self._stage, self._total, self._clock = stage, total, clock
        self._beat, self._last_beat = beat, -float("inf")
        self._observe = observe
        self._stream = sys.stderr if stream is None else stream
        self._as_json = log_format == "json"
        self._rewrites = self._stream.isatty() and not self._as_json
        self._interval_s = (0.5 if self._rewrites else 30.0) if interval_s is None else interval_s
        self._began = clock()
        self._last_line = -float("inf")
        self._width = 0

    def update(
        self, *, done: int, failed: int = 0, running: str = "", final: bool = False, counts: Counts | None = None
    ) -> None:
        """Report the counts so far; says nothing if the last line is too recent and this is not the final one.
        `running` and `counts` tell the same, in words and in numbers."""
        now = self._clock()
        if self._beat is not None and now - self._last_beat >= _BEAT_S:
            self._last_beat = now
            self._beat()
        says = final or now - self._last_line >= self._interval_s
        if not says and self._observe is None:
            return
        facts = self._facts(done, failed, counts or {}, now - self._began)
        if self._observe is not None:
            self._observe(facts)
        if says:
            self._last_line = now
            self._say(facts, running, final)

    def _facts(self, done: int, failed: int, counts: Counts, seconds: float) -> dict[str, float]:
        facts = {"done": done, "failed": failed, "total": self._total(), **counts, "seconds": round(seconds, 1)}
        if done + failed and seconds > 0:
            facts["per_minute"] = 60 * (done + failed) / seconds
            facts["seconds_left"] = max(0, facts["total"] - done - failed) * seconds / (done + failed)
        return facts

    def _say(self, facts: Facts, running: str, final: bool) -> None:
        line = self._line(facts, running)
        if self._as_json:
            numbers = {name: round(value, 1) for name, value in facts.items()}
            self._stream.write(json_line(line, logger="progress", facts={"stage": self._stage, **numbers}) + "\n")
        elif self._rewrites:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if final else ""))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, facts: Facts, running: str) -> str:
        parts = [f"{self._stage}: {facts['done']}/{facts['total']} done"]
        if facts["failed"]:
            parts.append(f"{facts['failed']} failed")
        if running:
            parts.append(running)
        parts.append(f"{format_seconds(facts['seconds'])} so far")
        if "per_minute" in facts:
            parts.append(f"{facts['per_minute']:.1f}/min")
        if facts.get("seconds_left"):
            parts.append(f"about {format_seconds(facts['seconds_left'])} left")
        return ", ".join(parts)
