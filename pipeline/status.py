"""`python -m pipeline.status OUTPUT`: how far a run is, how fast, and what failed, read from its output alone.

Works for a run that goes on, has ended or has died, on any store and from any machine; it needs neither a cluster nor
the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.exit_codes import OK
from pipeline.report.command_errors import exit_code_of
from pipeline.report.failures import group_by_kind
from pipeline.report.run_status import RunStatus, read_status
from pipeline.store.errors import printable_lines
from pipeline.store.storage import RunStore
from pipeline.times import format_duration, format_rough_duration, format_utc

_SHOWN_CAUSES = 10
_SHOWN_NAMES = 4

Found = TypeVar("Found", bound=Any)


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.status") -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)
    return run_query(options.output, read_status, describe, as_json=options.json)


def describe(status: RunStatus) -> Iterator[str]:
    """Yield lines for a person."""
    yield status.output
    yield f"  {_stage_line(status)}"
    if status.manifest and status.rows is not None:
        yield f"  manifest {status.manifest}, {status.rows:,} rows"
    yield ""
    for count, name in _row_counts(status):
        yield f"{count:>9,}  {name}"
    for number, (count, name) in enumerate(_other_counts(status)):
        yield f"{'' if number else 'also':>9}  {count:,} {name}"
    for name, text in _rate_lines(status):
        yield f"{name:>9}  {text}"
    for concept_id, damage in list(status.damaged.items())[:_SHOWN_CAUSES]:
        yield f"  DAMAGED  {concept_id}: {damage}"
    for stage, problem in status.problems.items():
        yield f"  PROBLEM  {stage}: {problem}"
    yield from _failure_lines(status)
    if status.unread:
        yield f"\n{status.unread:,} records were not read: the causes, the slowest and the median are of the others"
    yield from _advice(status)


def _failure_lines(status: RunStatus) -> Iterator[str]:
    if status.causes:
        yield "\nfailures by kind and cause"
    for group in group_by_kind(status.causes, _SHOWN_CAUSES):
        yield f"{group.count:>9,}  {group.title}: {group.remedy}"
        for cause in group.causes:
            names = ", ".join(cause.names[:_SHOWN_NAMES])
            more = f" and {cause.count - _SHOWN_NAMES:,} more" if cause.count > _SHOWN_NAMES else ""
            yield f"{cause.count:>11,}  {cause.cause}"
            yield f"{'':>11}  {names}{more}"
    if len(status.causes) > _SHOWN_CAUSES:
        yield f"{'':>9}  {len(status.causes) - _SHOWN_CAUSES:,} more causes, all with --json"


def _stage_line(status: RunStatus) -> str:
    quiet = format_rough_duration(status.quiet_s)
    began = f"; began {format_utc(status.started_at)}" if status.started_at else ""
    if status.alive:
        return f"{status.stage}, last wrote {quiet} ago{began}"
    if status.stage in ("ended", "stopped"):
        by_signal = " by a signal" if status.stage == "stopped" and not status.problems else ""
        return f"{status.stage}{by_signal} {quiet} ago{began}"
    if status.stage:
        return f"DEAD, or hung while {status.stage}: nothing was written for {quiet}{began}"
    return f"last written {quiet} ago"


def _row_counts(status: RunStatus) -> Iterator[tuple[int, str]]:
    """Yield counts that add up to the manifest's rows."""
    in_run = status.done - status.done_before
    before = f": {status.done_before:,} before, {in_run:,} by this run" if status.done_before else ""
    yield status.done, "done" + before
    yield status.failed, "failed"
    more = {
        "damaged, to be learned again": len(status.damaged),
        "bad rows": status.bad_rows,
        "being learned": status.learning,
        "waiting": status.waiting or 0,
        "left out by options": status.left_out,
    }
    yield from ((count, name) for name, count in more.items() if count)


def _other_counts(status: RunStatus) -> Iterator[tuple[int, str]]:
    """Yield counts of pictures, and of concepts that `_row_counts` has counted already."""
    others = "of other photos, rows or settings than now" if status.stage == "ended" else "of an earlier run so far"
    more = {
        "of the done below the gate, to be tried again": status.below_gate,
        "failed in an earlier run and were not tried since": status.failed_before,
        "interrupted, with a checkpoint to continue from": status.interrupted,
        f"with results {others}": status.other,
        "pictures drawn": status.pictures,
        "parts with pictures": 0 if status.pictures else status.packed_parts,
    }
    yield from ((count, name) for name, count in more.items() if count)


def _rate_lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    if status.concepts_per_hour:
        line = f"{status.concepts_per_hour:,.0f} concepts an hour"
        if status.recent_per_hour is not None:
            line += f", {status.recent_per_hour:,.0f} recently"
        if status.seconds_left:
            bound = "about" if status.looked_at == status.rows else "at most"
            line += f"; {bound} {format_rough_duration(status.seconds_left)} left"
        yield "rate", line
    if status.median_s:
        yield "median", f"{format_duration(status.median_s)} a concept"
    for number, attempt in enumerate(status.slowest):
        calls = f", {attempt.attempts} attempts" if attempt.attempts > 1 else ""
        text = f"{attempt.concept_id}, {format_duration(attempt.seconds)}, {attempt.steps:,} steps{calls}"
        yield "" if number else "slowest", text


def _advice(status: RunStatus) -> Iterable[str]:
    lines = []
    names = status.causes[0].names if status.causes else ()
    if names and names[0] != "unnamed":
        lines.append(f"details of one failure: python -m pipeline.explain {status.output} {names[0]}")
    if not status.alive and status.stage not in (None, "ended"):
        lines.append("run the same command again: it continues from the last checkpoints")
    return ["", *lines] if lines else []


def run_query(
    output: str, find: Callable[[RunStore], Found], describe: Callable[[Found], Iterable[str]], *, as_json: bool
) -> int:
    """Print what `find` returns for an output, a dataclass, as lines or as JSON; return the exit code."""

    def query() -> int:
        found = find(RunStore(output))
        text = json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(describe(found))
        sys.stdout.write(printable_lines(text) + "\n")
        return OK

    return exit_code_of(query)


if __name__ == "__main__":
    sys.exit(main())
