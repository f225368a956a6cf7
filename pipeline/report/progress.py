"""Progress lines of a stage: lines that are rewritten in a terminal, and a new line now and then in a job's log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from pipeline.config import LogFormat
from pipeline.report.concept_progress import ConceptProgress, StepRates, describe_concept, describe_steps
from pipeline.report.live_lines import LiveLines, is_terminal
from pipeline.report.logs import json_line
from pipeline.times import format_clock

_BEAT_S = 60.0
_TERMINAL_INTERVAL_S = 0.5
_LOG_INTERVAL_S = 30.0
_MAX_CONCEPT_LINES = 8

Counts = Mapping[str, int]
ProgressNumbers = Mapping[str, float]
"""The numbers of a progress line: `done`, `failed`, `total`, `seconds` so far, the counts that `update` was given,
`per_minute` once something is done or failed, and `seconds_left` from then or from the first steps on. The rate and the
time left are of concepts and of their tries with other settings (`tried_again`, `trying_again`) alike."""


class Progress:
    """Progress of one stage: counts, rate and remaining time, and in a terminal a line for each concept in flight."""

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
        in_flight: Callable[[], Sequence[ConceptProgress]] = tuple,
        batch_size: int = 1,
        starting: str = "",
    ) -> None:
        """Start with nothing done.

        total: number of rows; called for every line, because the plan may still be read.
        interval_s: least time between two lines, by default 0.5 s in a terminal and 30 s elsewhere.
        beat: called by the first update and then every minute.
        observe: called by every update.
        in_flight: returns the concepts in flight; called by every update.
        batch_size: samples of one concept's step.
        starting: what actors do while they start, for the time in which no other is ready.
        """
        self._stage = stage
        self._total = total
        self._clock = clock
        self._beat = beat
        self._last_beat = -math.inf
        self._observe = observe
        self._in_flight = in_flight
        self._batch_size = batch_size
        self._starting = starting
        self._rates = StepRates()
        self._stream = sys.stderr if stream is None else stream
        self._as_json = log_format == "json"
        self._live = LiveLines(self._stream) if is_terminal(self._stream) and not self._as_json else None
        default_s = _LOG_INTERVAL_S if self._live is None else _TERMINAL_INTERVAL_S
        self._interval_s = default_s if interval_s is None else interval_s
        self._began = clock()
        self._last_line = -math.inf

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
        concepts = () if final else self._in_flight()
        counts = counts or {}
        self._rates.update(now, done + failed + counts.get("tried_again", 0), concepts)
        is_due = final or now - self._last_line >= self._interval_s
        if not is_due and self._observe is None:
            return
        numbers = self._numbers(done, failed, counts, now - self._began)
        if self._observe is not None:
            self._observe(numbers)
        if is_due:
            self._last_line = now
            self._write(numbers, running, concepts)
        if final:
            self.close()

    def close(self) -> None:
        """Give the terminal back. May be called again."""
        if self._live is not None:
            self._live.close()

    def _numbers(self, done: int, failed: int, counts: Counts, seconds: float) -> dict[str, float]:
        total = self._total()
        numbers = {"done": done, "failed": failed, "total": total, **counts, "seconds": round(seconds, 1)}
        ended = done + failed + counts.get("tried_again", 0)
        left = max(0, total - done - failed) + counts.get("trying_again", 0)
        if ended and seconds > 0:
            numbers["per_minute"] = 60 * ended / seconds
            numbers["seconds_left"] = left * seconds / ended
        if (seconds_left := self._rates.seconds_left(ended + left)) is not None:
            numbers["seconds_left"] = seconds_left
        if per_s := self._rates.total_steps_per_s():
            numbers["samples_per_s"] = per_s * self._batch_size
        return numbers

    def _write(self, numbers: ProgressNumbers, running: str, concepts: Sequence[ConceptProgress]) -> None:
        if self._live is not None:
            self._live.draw([*self._concept_lines(concepts), self._line(numbers, running)])
            return
        steps = describe_steps(concepts, self._rates, self._batch_size)
        line = self._line(numbers, ", ".join(filter(None, [running, steps])))
        if self._as_json:
            rounded = {name: round(value, 1) for name, value in numbers.items()}
            line = json_line(line, logger="progress", facts={"stage": self._stage, **rounded})
        self._stream.write(line + "\n")
        self._stream.flush()

    def _concept_lines(self, concepts: Sequence[ConceptProgress]) -> list[str]:
        """Return a line for each of the first concepts, those in slots first."""
        shown = sorted(concepts, key=lambda each: each.phase != "learning")[:_MAX_CONCEPT_LINES]
        width = max((len(each.concept_id) for each in shown), default=0)
        lines = [
            f"  {each.concept_id:<{width}}  {describe_concept(each, self._rates, self._batch_size)}" for each in shown
        ]
        return [*lines, f"  and {len(concepts) - len(shown)} more"] if len(concepts) > len(shown) else lines

    def _line(self, numbers: ProgressNumbers, running: str) -> str:
        parts = [f"{self._stage}: {numbers['done']}/{numbers['total']} done"]
        if numbers["failed"]:
            parts.append(f"{numbers['failed']} failed")
        if tries := numbers.get("tried_again", 0) + numbers.get("trying_again", 0):
            parts.append(f"trying again: {numbers['tried_again']}/{tries} done")
        if running:
            parts.append(running)
        if self._starting and numbers.get("starting") and not numbers.get("ready"):
            parts.append(self._starting)
        parts.append(f"{format_clock(numbers['seconds'])} so far")
        if "per_minute" in numbers:
            parts.append(f"{numbers['per_minute']:.1f}/min")
        if numbers.get("seconds_left"):
            parts.append(f"about {format_clock(numbers['seconds_left'])} left")
        return ", ".join(parts)
