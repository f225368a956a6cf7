from __future__ import annotations

import datetime
import math
import signal
import sys
import time
import weakref

import pytest

from pipeline.times import DeadlinePassed, interrupting, parse_deadline

NIGHT = datetime.datetime(2026, 11, 21, 23, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+6h", "2026-11-22T05:30+01:00"),
        ("+90m", "2026-11-22T01:00+01:00"),
        ("+30s", "2026-11-21T23:30:30+01:00"),
        ("06:00", "2026-11-22T06:00+01:00"),
        ("23:45", "2026-11-21T23:45+01:00"),
        ("22:00", "2026-11-21T22:00+01:00"),  # just passed: nothing is begun
        ("17:00", "2026-11-22T17:00+01:00"),
        ("2026-11-22T06:00+00:00", "2026-11-22T07:00+01:00"),
    ],
)
def test_moments(text: str, expected: str) -> None:
    assert parse_deadline(text, NIGHT) == datetime.datetime.fromisoformat(expected).timestamp()


def test_just_after_midnight_yesterdays_evening_has_passed() -> None:
    early = NIGHT.replace(day=22, hour=0, minute=10)
    assert parse_deadline("23:00", early) == NIGHT.replace(hour=23, minute=0).timestamp()


def test_none_is_never() -> None:
    assert parse_deadline(None) == math.inf
    before = signal.getsignal(signal.SIGALRM)
    with interrupting(math.inf):
        assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize("text", ["", "6", "25:00", "12:60", "tomorrow", "+6", "2026-11-22", "-1h"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--finish-by"):
        parse_deadline(text, NIGHT)


def test_a_block_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DeadlinePassed), interrupting(time.time() + 0.05):
        time.sleep(30)
    assert signal.getsignal(signal.SIGALRM) is before
    others_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's own, or none
    with interrupting(time.time() + 600):
        pass
    assert 0 <= others_s - signal.getitimer(signal.ITIMER_REAL)[0] < 300


def test_a_block_whose_deadline_has_passed_is_not_begun() -> None:
    with pytest.raises(DeadlinePassed), interrupting(time.time() - 10):
        pytest.fail("begun")


def test_an_interruption_that_python_drops_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_value))

    class Thing:
        pass

    things = [Thing()]
    reference = weakref.ref(things[0], lambda _: time.sleep(30))

    def wait() -> None:
        things.clear()
        time.sleep(30)

    with pytest.raises(DeadlinePassed), interrupting(time.time() + 1.0, again_s=1.0):
        wait()
    assert reference() is None
    assert isinstance(dropped[0], DeadlinePassed)
