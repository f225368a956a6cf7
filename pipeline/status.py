"""`python -m pipeline.status OUTPUT`: how far a run is, how fast, and what failed, from its objects alone.

For a run that goes on, has ended or has died, on any store, from any machine: it needs neither a cluster nor the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from pipeline.exit_codes import OK, USAGE
from pipeline.report.run_status import RunStatus, read_status
from pipeline.store.errors import is_client_error
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import format_duration, format_rough_duration, format_utc

_SHOWN_CAUSES, _SHOWN_NAMES = 10, 4

Found = TypeVar("Found", bound=Any)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    options = parser.parse_args(arguments)
    return answer(options.output, read_status, describe, as_json=options.json)


def describe(status: RunStatus) -> Iterator[str]:
    """Lines for a person."""
    yield status.output
    yield f"  {_run_line(status)}"
    if status.manifest and status.rows is not None:
        yield f"  manifest {status.manifest}, {status.rows:,} rows"
    yield ""
    for count, name in _counts(status):
        yield f"{count:>9,}  {name}"
    for number, (count, name) in enumerate(_others(status)):
        yield f"{'' if number else 'also':>9}  {count:,} {name}"
    for name, text in _paces(status):
        yield f"{name:>9}  {text}"
    for stage, problem in status.problems.items():
        yield f"  PROBLEM  {stage}: {problem}"
    if status.causes:
        yield "\nfailures by cause"
    for cause in islice(status.causes, _SHOWN_CAUSES):
        names = ", ".join(cause.names[:_SHOWN_NAMES])
        more = f" and {cause.count - _SHOWN_NAMES:,} more" if cause.count > _SHOWN_NAMES else ""
        yield f"{cause.count:>9,}  {cause.cause}"
        yield f"{'':>9}  {names}{more}"
    if len(status.causes) > _SHOWN_CAUSES:
        yield f"{'':>9}  {len(status.causes) - _SHOWN_CAUSES:,} more causes, all with --json"
    if status.unread:
        yield f"\n{status.unread:,} records were not read: the causes and the slowest are of the others"
    yield from _advice(status)


def _run_line(status: RunStatus) -> str:
    quiet = format_rough_duration(status.quiet_s)
    began = f"; began {format_utc(status.started_at)}" if status.started_at else ""
    if status.alive:
        return f"{status.stage}, last wrote {quiet} ago{began}"
    if status.stage in ("ended", "stopped"):
        return f"{status.stage}{' by a signal' if status.stage == 'stopped' else ''} {quiet} ago{began}"
    if status.stage:
        return f"DEAD, or hung while {status.stage}: nothing was written for {quiet}{began}"
    return f"last written {quiet} ago"


def _counts(status: RunStatus) -> Iterator[tuple[int, str]]:
    """What became of every row: together they are all."""
    in_run = status.done - status.done_before
    before = f": {status.done_before:,} before, {in_run:,} by this run" if status.done_before else ""
    yield status.done, "done" + before
    yield status.failed, "failed"
    more = {
        "bad rows": status.bad_rows,
        "being learned": status.learning,
        "waiting": status.waiting or 0,
        "left out by options": status.left_out,
    }
    yield from ((count, name) for name, count in more.items() if count)


def _others(status: RunStatus) -> Iterator[tuple[int, str]]:
    """What else there is; concepts that the rows' counts hold already."""
    others = "of other photos, rows or settings than now" if status.stage == "ended" else "of an earlier run so far"
    more = {
        "of the done below the gate, to be tried again": status.below_gate,
        "failed in an earlier run and were not tried since": status.failed_before,
        "interrupted, with a checkpoint to go on from": status.interrupted,
        f"with results {others}": status.other,
        "pictures drawn": status.pictures,
        "parts with pictures": 0 if status.pictures else status.packed_parts,
    }
    yield from ((count, name) for name, count in more.items() if count)


def _paces(status: RunStatus) -> Iterator[tuple[str, str]]:
    if status.concepts_per_hour:
        line = f"{status.concepts_per_hour:,.0f} concepts an hour"
        if status.recent_per_hour is not None:
            line += f", {status.recent_per_hour:,.0f} of late"
        if status.seconds_left:
            most = "about" if status.looked_at == status.rows else "at most"
            line += f"; {most} {format_rough_duration(status.seconds_left)} left"
        yield "rate", line
    if status.median_s:
        yield "median", f"{format_duration(status.median_s)} a concept"
    for number, facts in enumerate(status.slowest):
        tries = f", {facts.attempts} attempts" if facts.attempts > 1 else ""
        text = f"{facts.concept_id}, {format_duration(facts.seconds)}, {facts.steps:,} steps{tries}"
        yield "" if number else "slowest", text


def _advice(status: RunStatus) -> Iterable[str]:
    names: Sequence[str] = status.causes[0].names if status.causes else ()
    lines = []
    if names and names[0] != "unnamed":
        lines.append(f"why, and what there is of one: python -m pipeline.explain {status.output} {names[0]}")
    if not status.alive and status.stage not in (None, "ended"):
        lines.append("run the same command again: it goes on from the last checkpoints")
    return ["", *lines] if lines else []


def answer(
    output: str, find: Callable[[RunStore], Found], describe: Callable[[Found], Iterable[str]], *, as_json: bool
) -> int:
    """Print what `find` makes of an output, a dataclass, and return the exit code; its ValueErrors and whatever a store
    raises are told in a line."""
    try:
        found = find(RunStore(output))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {redact(str(error)) or type(error).__name__}\n")
        return USAGE
    except Exception as error:
        if not is_client_error(error):
            raise
        sys.stderr.write(f"error: {redact(f'{output} cannot be reached: {error}')}\n")
        return USAGE
    text = json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(describe(found))
    sys.stdout.write(redact(text) + "\n")
    return OK


if __name__ == "__main__":
    sys.exit(main())
