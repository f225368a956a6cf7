"""Helpers of the speed benchmarks: alternating repetitions, several processes at once, and results as markdown.

Compared works alternate within one run, forwards and then backwards, so that a slow phase of the machine slows all of
them; figures are medians, with the lowest and highest beside them.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import BrokenBarrierError
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PACKAGES = ("torch", "diffusers", "transformers", "ray")


class Rendezvous(Protocol):
    """Barrier that all processes pass together: a `multiprocessing.Barrier`, or `Alone`."""

    def wait(self) -> int: ...


class Alone:
    """Barrier of a single process, which waits for no other."""

    def wait(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest value of a figure over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def alternate(
    works: Mapping[str, Callable[[], T]], repetitions: int, together: Rendezvous | None = None, warm_up: bool = True
) -> dict[str, list[T]]:
    """Return the results of each work, one a repetition; all processes begin each work `together`. With `warm_up`, each
    work is first done once without being counted."""
    if repetitions < 1:
        raise ValueError(f"repetitions = {repetitions}: must be 1 or more")
    together = together or Alone()
    results: dict[str, list[T]] = {name: [] for name in works}
    names = list(works)
    for repetition in range(-1 if warm_up else 0, repetitions):
        for name in names if repetition % 2 == 0 else names[::-1]:
            together.wait()
            result = works[name]()
            if repetition >= 0:
                results[name].append(result)
    return results


def side_by_side(processes: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """Call `work(together, *arguments)` in `processes` processes at the same time and return their results; one is this
    process."""
    if processes == 1:
        return [work(Alone(), *arguments)]
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    meeting = spawn.Barrier(processes)
    with ProcessPoolExecutor(processes, spawn, initializer=_meet_at, initargs=(meeting,)) as pool:
        futures = [pool.submit(_at_meeting, work, *arguments) for _ in range(processes)]
        errors = [error for future in futures if (error := future.exception())]
        # the errors of the other processes only say that one is missing
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


_meeting: Any = Alone()


def _meet_at(meeting: Any) -> None:
    global _meeting
    _meeting = meeting


def _at_meeting(work: Callable[..., T], *arguments: Any) -> T:
    try:
        return work(_meeting, *arguments)
    except BaseException:
        _meeting.abort()  # otherwise the other processes would wait for ever
        raise


def heading(title: str, module: str, arguments: Sequence[str], **facts: object) -> str:
    """Return the head of a result: command, date, processor and versions, then the benchmark's own `facts`."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    lines = {
        "command": f"`{' '.join(['python', '-m', module, *arguments])}`",
        "machine": f"{cpu_name()}, {cores} of {os.cpu_count()} cores usable; load average at the start {load}",
        "versions": ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
        + f", python {platform.python_version()}",
        **{name.replace("_", " "): value for name, value in facts.items()},
    }
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return f"# {title}, {date}\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items()) + "\n"


def installed_version(package: str) -> str:
    """Return the version of a package; "absent" for one that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table; numbers have three digits, None is a dash."""
    return table_line(titles) + "|---" * len(titles) + "|\n" + "".join(table_line(row) for row in rows)


def table_line(row: Sequence[object]) -> str:
    """Return one line of a table, for a table that is printed row by row."""
    return f"| {' | '.join(cell(value) for value in row)} |\n"


def cell(value: object) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """Format a number with three digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}" if abs(value) >= 1 else f"{value:.3g}"


def parse_numbers(text: str) -> list[int]:
    """Parse whole numbers with commas between."""
    return [int(number) for number in text.split(",")]


def cpu_name() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_mb() -> float:
    """Return the highest resident memory of this process so far, in MB; `ru_maxrss` would include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write progress to standard error, apart from the table."""
    sys.stderr.write(f"{text}\n")
