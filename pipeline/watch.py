"""`python -m pipeline.watch OUTPUT`: follow a run from any machine, a line for each change of its `run.json`.

It ends when the run has ended, with the run's own exit code, and needs neither a cluster nor the model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.exit_codes import FAILED
from pipeline.report.command_errors import exit_code_of
from pipeline.report.run_file import read_run
from pipeline.store.errors import printable_lines
from pipeline.store.storage import RunStore
from pipeline.times import format_clock, format_rough_duration, format_utc

_EVERY_S = 10.0
_QUIET_S = 600.0
"""Time without a change after which a line says so."""
_ENDED = ("ended", "stopped")


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.watch") -> int:
    """Run the command; return the run's exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=_EVERY_S, help="time between two looks (default: %(default)s)"
    )
    parser.add_argument("--next", action="store_true", help="wait for the run after the one that is there now")
    options = parser.parse_args(arguments)

    def watch() -> int:
        runs = follow(RunStore(options.output), lambda: time.sleep(options.every), skip_first=options.next)
        run: dict[str, Any] = {}
        for run in announce_quiet(runs, options.output, time.monotonic):
            _say(describe(run))
        _say(describe_end(run))
        code = run.get("exit_code")
        return FAILED if code is None else int(code)

    return exit_code_of(watch)


def follow(store: RunStore, wait: Callable[[], None], *, skip_first: bool = False) -> Iterator[dict[str, Any] | None]:
    """Yield the content of `run.json` whenever it has changed, and None at every other look, until the run has ended.

    `wait` is called between two looks. `skip_first`: leave out the run that is there at the first look. Raises
    ValueError if there is no run.
    """
    first = _read(store)
    if first is None and not skip_first:
        raise ValueError(f"{store.root}: there is no run.json, so no run has begun here; --next waits for one")
    skipped = first.get("started_at") if first and skip_first else None
    before: dict[str, Any] | None = None
    while True:
        run = _read(store)
        is_ours = run is not None and (not skip_first or run.get("started_at") != skipped)
        if run is not None and is_ours and run != before:
            yield run
            if run.get("stage") in _ENDED:
                return
            before = run
        else:
            yield None
        wait()


def announce_quiet(
    runs: Iterator[dict[str, Any] | None], output: str, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Yield the changes of a run, and say once for each of its pauses that it has written nothing for ten minutes."""
    changed, has_said = clock(), False
    for run in runs:
        if run is not None:
            changed, has_said = clock(), False
            yield run
        elif not has_said and clock() - changed >= _QUIET_S:
            has_said = True
            quiet = format_rough_duration(clock() - changed)
            _say(f"run.json has not changed for {quiet}; python -m pipeline.status {output} says whether the run lives")


def describe(run: dict[str, Any]) -> str:
    """Return a line about the run as far as it is."""
    counts = run.get("counts", {})
    numbers = run.get("progress") or {}
    num_done, total = counts.get("learned", 0), counts.get("rows", 0) - counts.get("done_before", 0)
    total -= counts.get("left_out", 0) + counts.get("bad_rows", 0)
    parts = [f"{num_done:,} of {total:,} learned", f"{counts.get('done_before', 0):,} done before"]
    parts += [f"{counts[name]:,} {words}" for name, words in _OTHERS.items() if counts.get(name)]
    if "in_flight" in numbers and run.get("stage") not in _ENDED:
        parts.append(f"{numbers['in_flight']:.0f} on {numbers.get('ready', 0):.0f} actors")
    parts.append(f"{format_clock(run.get('seconds', 0.0))} so far")
    if numbers.get("seconds_left", 0) >= 1 and run.get("stage") == "learning":
        parts.append(f"about {format_clock(numbers['seconds_left'])} left")
    parts += [f"PROBLEM {stage}: {problem}" for stage, problem in counts.get("problems", {}).items()]
    return f"{format_utc(run.get('written_at', ''))}  {run.get('stage')}: {', '.join(parts)}"


_OTHERS = {"failed": "failed", "bad_rows": "bad rows", "left_out": "left out"}
"""Counts that are shown where they are not 0 -> their names."""


def describe_end(run: dict[str, Any]) -> str:
    """Return a line about how the run ended."""
    if run.get("exit_code") is None:
        return f"{run.get('stage')}; run.json holds no exit code, as a release before this one wrote it"
    return f"exit code {run['exit_code']}: {run.get('meaning')}"


def _read(store: RunStore) -> dict[str, Any] | None:
    """Return the content of `run.json`; None if there is none. Raises ValueError if it does not describe a run."""
    try:
        return read_run(store)
    except FileNotFoundError:
        return None


def _say(line: str) -> None:
    sys.stdout.write(printable_lines(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
