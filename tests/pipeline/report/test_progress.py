"""Lines in a log, one line in a terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from pipeline.report.concept_progress import ConceptProgress
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
    first, last = terminal.getvalue().split("\r\x1b[J")
    assert first == "learning: 0/2 done, a long remark about actors, 0:00 so far"
    assert last == "learning: 2/2 done, 1:00 so far, 2.0/min\n"


def concept(name: str, step: int, phase: Any = "learning") -> ConceptProgress:
    return ConceptProgress(concept_id=name, phase=phase, step=step, steps=100, loss=0.25)


def test_a_terminal_shows_each_concept_and_the_time_left_from_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    clock, terminal, steps = Clock(), Terminal(), [0]
    progress = Progress(
        "learning",
        total=lambda: 4,
        stream=terminal,
        clock=clock,
        in_flight=lambda: [concept("a-teapot", 0, "preparing"), concept("mug", steps[0])] if steps[0] else [],
        batch_size=2,
        starting="loading the model",
    )
    progress.update(done=0, counts={"starting": 1, "ready": 0})
    for second, step in ((20, 10), (30, 20)):
        clock.seconds, steps[0] = float(second), step
        progress.update(done=0, counts={"starting": 0, "ready": 1})
    first, _, last = terminal.getvalue().split("\x1b[J")
    assert first.strip() == "learning: 0/4 done, loading the model, 0:00 so far"
    mug, teapot, total = last.split("\n")
    assert mug == "  mug       step 20 of 100  loss 0.2500  2.0 samples/s  1:20 left"
    assert teapot == "  a-teapot  reads its photos"
    assert total == "learning: 0/4 done, 0:30 so far, about 6:20 left"  # 3.8 concepts to go, at 0.1 in 10 s


def test_a_log_names_steps_loss_and_rate() -> None:
    clock, log, steps = Clock(), io.StringIO(), [5]
    progress = Progress(
        "learning",
        total=lambda: 20,
        stream=log,
        clock=clock,
        in_flight=lambda: [concept(f"c{i}", steps[0] + i) for i in range(12)],
    )
    for second in (0, 40):
        clock.seconds, steps[0] = float(second), 5 + second
        progress.update(done=0, running="12 on 1 actors")
    assert log.getvalue().splitlines()[1] == (
        "learning: 0/20 done, 12 on 1 actors, steps 45 to 56, loss 0.2500, 12.0 samples/s, 0:40 so far, about 1:56 left"
    )
    terminal = Terminal()
    progress = Progress("x", lambda: 1, stream=terminal, in_flight=lambda: [concept(f"c{i}", 1) for i in range(12)])
    progress.update(done=0)
    assert "\n  and 4 more\n" in terminal.getvalue()


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


def test_tries_are_counted_apart_from_concepts() -> None:
    clock, log, observed = Clock(), io.StringIO(), list[dict[str, float]]()
    progress = Progress(
        "learning", lambda: 6, stream=log, clock=clock, observe=lambda facts: observed.append({**facts})
    )
    for second, done, tried, trying in ((0, 0, 0, 0), (40, 4, 0, 1), (80, 6, 2, 1), (120, 6, 4, 0)):
        clock.seconds = float(second)
        progress.update(done=done, counts={"tried_again": tried, "trying_again": trying})
    assert log.getvalue().splitlines() == [
        "learning: 0/6 done, 0:00 so far",
        "learning: 4/6 done, trying again: 0/1 done, 0:40 so far, 6.0/min, about 0:30 left",
        "learning: 6/6 done, trying again: 2/3 done, 1:20 so far, 6.0/min, about 0:10 left",
        "learning: 6/6 done, trying again: 4/4 done, 2:00 so far, 5.0/min",
    ]
    assert [facts["done"] for facts in observed] == [0, 4, 6, 6]


def test_seconds() -> None:
    assert [format_clock(s) for s in (0, 75.4, 3700)] == ["0:00", "1:15", "1:01:40"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
