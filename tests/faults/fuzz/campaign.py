"""Run many cases of one area with a seed, within bounds of time and memory, and gather each kind of failure once."""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from tests.faults.fuzz.outcomes import Undocumented, kind_of


@dataclass(frozen=True)
class Area:
    """One kind of input, with the strategy of its cases and the check that a case ends as documented."""

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], str]
    """Case -> the name of its outcome; raises for an outcome that is not documented."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of one case."""

    seconds: float
    mebibytes: int
    """Memory that the process may take beside what it has before the case."""


@dataclass
class Report:
    """Outcomes of the cases of one area."""

    area: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    """Kind of failure -> a case that fails so, and its traceback."""
    seconds: float = 0.0
    slowest_s: float = 0.0
    largest_mebibytes: int = 0

    @property
    def num_cases(self) -> int:
        return self.outcomes.total()

    def line(self) -> str:
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return (
            f"{self.area}: {self.num_cases:,} cases in {self.seconds:.0f} s (slowest {self.slowest_s:.1f} s, most "
            f"memory {self.largest_mebibytes:,} MiB): {told}"
        )


def run_area(area: Area, num_cases: int, seed: int, bounds: Bounds | None, *, shrinks: bool = False) -> Report:
    """Run cases until `num_cases` have ended, and go on after each failure with its kind left out.

    `bounds`: those of each case; None for none. `shrinks`: make the failing cases small, which may take minutes for
    each.
    """
    report = Report(area.name)
    began = time.monotonic()
    while (left := num_cases - report.num_cases) > 0:
        known = len(report.findings)
        _run_until_new_failure(area, left, seed + known, bounds, report, shrinks=shrinks)
        if len(report.findings) == known and num_cases - report.num_cases == left:
            break  # the strategy has no further cases
    report.seconds = time.monotonic() - began
    return report


def _run_until_new_failure(
    area: Area, num_cases: int, seed: int, bounds: Bounds | None, report: Report, *, shrinks: bool
) -> None:
    """Run cases up to the first failure of a kind that the report does not have, which is kept."""
    found: dict[str, str] = {}

    def trial(case: Any) -> None:
        try:
            with watched(bounds, report) if bounds else nullcontext():
                outcome = area.check(case)
        except Exception as error:
            kind = kind_of(error)
            if kind not in report.findings:
                if found and kind not in found:
                    return  # another failure met while the first one is made small
                found[kind] = f"{case!r}\n{''.join(traceback.format_exception(error, limit=-8))}"
                raise
            outcome = f"again: {kind}"
        if not found:
            report.outcomes[outcome] += 1

    run = hypothesis.settings(
        max_examples=num_cases, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,), report_multiple_bugs=False,
    )(hypothesis.seed(seed)(hypothesis.given(area.cases)(trial)))  # fmt: skip
    try:
        run()
    except Exception as error:
        if not found:
            raise
        report.findings |= found
        report.outcomes[f"FAILED: {kind_of(error)}"] += 1


class _TooLong(BaseException):
    """Raised in the middle of a case; no Exception, because the code under test turns all of those into its own."""


@contextmanager
def watched(bounds: Bounds, report: Report) -> Iterator[None]:
    """Raise Undocumented if the block takes more time or memory than `bounds`."""

    def stop(*_: object) -> None:
        raise _TooLong

    former = signal.signal(signal.SIGALRM, stop)
    before = _restart_peak()
    signal.setitimer(signal.ITIMER_REAL, bounds.seconds)
    began = time.monotonic()
    try:
        yield
    except _TooLong as error:
        raise Undocumented(f"it takes too long: more than {bounds.seconds:.0f} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        seconds, taken = time.monotonic() - began, (_peak_kibibytes() - before) // 1024
        report.slowest_s = max(report.slowest_s, seconds)
        report.largest_mebibytes = max(report.largest_mebibytes, taken)
    if seconds > bounds.seconds:  # Python drops what is raised while it calls back, as in collecting garbage
        raise Undocumented(f"it takes too long: {seconds:.0f} s, more than {bounds.seconds:.0f} s")
    if taken > bounds.mebibytes:
        raise Undocumented(f"it takes too much memory: {taken:,} MiB, more than {bounds.mebibytes:,}")


def _restart_peak() -> int:
    """Make the kernel measure the peak of this process's memory from now on; return what it has now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_kibibytes()


def _peak_kibibytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])
