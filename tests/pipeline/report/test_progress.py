"""Lines in a log, one line in a terminal."""

from __future__ import annotations

import io
import json

import pytest

from pipeline.report.progress import Progress
from pipeline.times import format_clock, format_duration


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress("learning", total=lambda: 10, stream=log, clock=clock)
    for second in range(61):
        clock.seconds = float(second)
        progress.update(done=second // 20, failed=second // 60)
    progress.update(done=3, failed=1, final=True)
    lines = log.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[1] == "learning: 1/10 done, 0:30 so far, 2.0/min, about 4:30 left"
    assert lines[2] == "learning: 3/10 done, 1 failed, 1:00 so far, 4.0/min, about 1:30 left"


def test_a_terminal_line_is_rewritten() -> None:
    clock, terminal = Clock(), Terminal()
    progress = Progress("learning", total=lambda: 2, stream=terminal, clock=clock)
    progress.update(done=0, running="a long remark about actors")
    clock.seconds = 0.2
    progress.update(done=1)
    clock.seconds = 60.0
    progress.update(done=2, final=True)
    text = terminal.getvalue()
    assert text.count("\r") == 2
    assert text.count("\n") == 1
    first, last = text.strip("\r\n").split("\r")
    assert len(last) >= len(first)
    assert last.rstrip() == "learning: 2/2 done, 1:00 so far, 2.0/min"


def test_a_beat_at_once_and_every_minute_of_updates() -> None:
    clock, beats = Clock(), list[float]()
    progress = Progress(
        "learning", total=lambda: 1, stream=io.StringIO(), clock=clock, beat=lambda: beats.append(clock.seconds)
    )
    for second in range(0, 200, 7):
        clock.seconds = float(second)
        progress.update(done=0)
    assert beats == [0.0, 63.0, 126.0, 189.0]


def test_numbers_for_log_stores_and_metrics() -> None:
    clock, log, observed = Clock(), Terminal(), list[dict[str, float]]()
    progress = Progress(
        "learning",
        lambda: 4,
        stream=log,
        clock=clock,
        log_format="json",
        observe=lambda facts: observed.append({**facts}),
    )
    for second in range(5):
        clock.seconds = float(second)
        progress.update(done=second // 2, running="1 on 1 actors", counts={"retried": second})
    progress.update(done=3, failed=1, final=True)
    first, last = (json.loads(line) for line in log.getvalue().splitlines())  # no line is rewritten
    assert first["message"] == "learning: 0/4 done, 1 on 1 actors, 0:00 so far"
    assert (first["stage"], first["retried"], first["total"]) == ("learning", 0, 4)
    assert (last["done"], last["failed"], last["seconds_left"], last["per_minute"]) == (3, 1, 0, 60)
    assert [facts["done"] for facts in observed] == [0, 0, 1, 1, 2, 3]  # more often than there are lines
    assert [facts.get("seconds_left") for facts in observed] == [None, None, 6, 9, 4, 0]


def test_seconds() -> None:
    assert [format_clock(s) for s in (0, 75.4, 3700)] == ["0:00", "1:15", "1:01:40"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
