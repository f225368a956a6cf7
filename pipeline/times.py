"""Times: the moment when a run is to end, the time as records write it, and durations as people read them."""

from __future__ import annotations

import datetime
import math
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_JUST_PASSED = datetime.timedelta(hours=6)
_RAISED_AGAIN_S = 10.0
_UNITS = {"h": "hours", "m": "minutes", "s": "seconds"}


class DeadlinePassed(Exception):
    """Raised in the main thread by `interrupting`, in the middle of whatever the thread does."""


@contextmanager
def interrupting(until: float, again_s: float = _RAISED_AGAIN_S) -> Iterator[None]:
    """Raise DeadlinePassed in the block at `until`, in seconds since 1970, or before it if that has passed.

    It is raised again every `again_s` seconds until the block has ended: Python drops an exception that is raised in a
    finalizer or in a weak reference's callback. Works in the main thread alone.
    """
    if until == math.inf:
        yield
        return
    began = time.time()
    if began >= until:
        raise DeadlinePassed

    def ring(_signal: int, _frame: object) -> None:
        raise DeadlinePassed

    before = signal.signal(signal.SIGALRM, ring)
    others_s, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - began), again_s)
    try:
        yield
    finally:
        # A process has one such timer, and other code may be waiting for it.
        signal.setitimer(signal.ITIMER_REAL, others_s and max(1e-3, others_s - (time.time() - began)))
        signal.signal(signal.SIGALRM, before)


def parse_deadline(text: str | None, now: datetime.datetime | None = None) -> float:
    """Return the moment that `text` names, in seconds since 1970; infinity for None.

    `+6h`, `+90m` and `+30s` count from `now`. A date and time is in ISO 8601. `06:00` is the next one, or the one that
    passed at most six hours ago: a job that its scheduler starts again after the deadline ends at once, not a day
    later. `now` has a time zone; a time without one is in the zone of this machine. Raises ValueError for anything
    else.
    """
    if text is None:
        return math.inf
    now = now or datetime.datetime.now().astimezone()
    if delay := re.fullmatch(r"\+(\d+(?:\.\d+)?)([hms])", text):
        return (now + datetime.timedelta(**{_UNITS[delay[2]]: float(delay[1])})).timestamp()
    if clock := re.fullmatch(r"(\d{1,2}):(\d{2})", text):
        hour = int(clock[1])
        minute = int(clock[2])
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
    """Return the time as records write it: UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=precision)


def format_clock(seconds: float) -> str:
    """Format a duration like a clock: `1:15` for 75 seconds, `1:01:40` for 3700."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_duration(seconds: float) -> str:
    """Format a duration with units: `4.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_rough_duration(seconds: float) -> str:
    """Format a duration like `format_duration`, in whole seconds, or in days from the third day on."""
    days = int(seconds // 86400)
    return f"{days} days" if days > 2 else format_duration(round(seconds)).replace(".0 s", " s")


def format_utc(iso: str) -> str:
    """Format a UTC time in ISO 8601 as `2026-11-22 06:00:00 UTC`; empty for an empty text."""
    return f"{iso[:19].replace('T', ' ')} UTC" if iso else ""
