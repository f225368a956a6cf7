"""Times: the moment a run is to end, the time as records write it, and durations as people read them."""

from __future__ import annotations

import datetime
import math
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_JUST_PASSED = datetime.timedelta(hours=6)
_UNITS = {"h": "hours", "m": "minutes", "s": "seconds"}


class DeadlinePassed(Exception):
    """Raised in the main thread, in the middle of whatever it does."""


@contextmanager
def interrupting(until: float) -> Iterator[None]:
    """Raise DeadlinePassed in the block at a time, in seconds since 1970. For the main thread alone."""
    if until == math.inf:
        yield
        return

    def ring(_signal: int, _frame: object) -> None:
        raise DeadlinePassed

    handler, began = signal.signal(signal.SIGALRM, ring), time.time()
    others_s, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - began))
    try:
        yield
    finally:
        # there is one such timer a process, and somebody may wait for it already
        signal.setitimer(signal.ITIMER_REAL, others_s and max(1e-3, others_s - (time.time() - began)))
        signal.signal(signal.SIGALRM, handler)


def moment_named(text: str | None, now: datetime.datetime | None = None) -> float:
    """Seconds since 1970; infinity for None. `now` has a time zone; times without one are in that of this machine.

    `+6h`, `+90m`, `+30s`: from now. A date and time in ISO 8601. `06:00`: the next one, or the one that has just
    passed, up to six hours ago: a job that its scheduler starts again after the deadline ends at once, not the day
    after.
    Raises ValueError for anything else.
    """
    if text is None:
        return math.inf
    now = now or datetime.datetime.now().astimezone()
    if span := re.fullmatch(r"\+(\d+(?:\.\d+)?)([hms])", text):
        return (now + datetime.timedelta(**{_UNITS[span[2]]: float(span[1])})).timestamp()
    if clock := re.fullmatch(r"(\d{1,2}):(\d{2})", text):
        hour, minute = int(clock[1]), int(clock[2])
        if hour < 24 and minute < 60:
            today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            days = (today + datetime.timedelta(days=number) for number in (-1, 0, 1))
            return next(day for day in days if day > now - _JUST_PASSED).timestamp()
    try:
        named = datetime.datetime.fromisoformat(text)
    except ValueError:
        named = None
    if named is None or not re.search(r"[T ]\d", text):
        raise ValueError(f"--finish-by {text!r}: write 06:00, a date and time as 2026-11-22T06:00+01:00, or +6h")
    return (named if named.tzinfo else named.astimezone()).timestamp()


def now(precision: str = "seconds") -> str:
    """The time as records write it: UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=precision)


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def span(seconds: float) -> str:
    """As `duration`, in whole seconds; days from the third on."""
    days = int(seconds // 86400)
    return f"{days} days" if days > 2 else duration(round(seconds)).replace(".0 s", " s")


def moment(iso: str) -> str:
    """ISO 8601 UTC as a person reads it."""
    return f"{iso[:19].replace('T', ' ')} UTC" if iso else ""
