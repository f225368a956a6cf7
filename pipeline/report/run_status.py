"""The state of a run, read from its output by one listing.

Records are read only where the last results.parquet does not hold them, and of those the newest few hundred at most.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.ledger.done import find_damaged
from pipeline.ledger.listing import ConceptListing
from pipeline.ledger.records import record_or_failure
from pipeline.report.failures import Cause, find_causes
from pipeline.report.run_file import RUN_FILE, read_run
from pipeline.store.addresses import open_for_reading
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.errors import BAD_INPUT

_RESULTS = "results.parquet"
_MAX_RECORDS = 500
"""Records that are read one by one."""
_QUIET_S = 600.0
"""A run that has written nothing for this long counts as dead."""
_RECENT_S = 1800.0
_SLOWEST = 5
_BAD_ROW = "row "
"""Prefix of the keys of bad rows, which have no fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptInfo:
    """Facts of the last attempt at a concept."""

    concept_id: str
    error: str = ""
    error_kind: str = ""
    seconds: float = 0.0
    steps: int = 0
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class ConceptState:
    """The state of a concept, from the newest of its record, failure and checkpoint."""

    fingerprint: str
    status: Literal["done", "failed", "learning"]
    at: float
    """Time of writing, in seconds since 1970 by the store's clock."""


@dataclass(kw_only=True)
class RunStatus:
    """The state of a run. Counts are of concepts unless the field says otherwise; times are UTC, ISO 8601; None stands
    for what is not known."""

    output: str
    stage: str | None = None
    """`learning`, `drawing`, `reporting`, `ended` or `stopped`; None for a run whose run.json names no stage."""
    alive: bool = False
    """True if the run has not ended and has written something in the last ten minutes."""
    started_at: str | None = None
    last_write_at: str | None = None
    quiet_s: float = 0.0
    """Seconds since the last write."""
    manifest: str | None = None
    rows: int | None = None
    """Rows of the manifest."""
    looked_at: int | None = None
    """Rows that the run has compared with the records so far."""
    done: int = 0
    """Concepts with a result for the present photos, row and settings, of this run or an earlier one."""
    done_before: int = 0
    """Concepts among `done` that the run found done."""
    failed: int = 0
    failed_before: int = 0
    """Concepts that failed in an earlier run and were not tried by this one, or not yet."""
    bad_rows: int = 0
    learning: int = 0
    """Concepts with a checkpoint and no result, in a run that is alive."""
    interrupted: int = 0
    """Concepts with a checkpoint and no result that no run works on; the next run continues them."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Concept id -> damage of its record or files, which the next run learns again; not among `done`. On object stores
    only records in the copy of all records are looked at."""
    below_gate: int = 0
    """Concepts among `done` below the quality gate, which this run or the next tries again."""
    waiting: int | None = None
    left_out: int = 0
    """Rows left out by --only, --limit or --retry."""
    other: int = 0
    """Concepts with results of an earlier run that the present run has not found to be done."""
    pictures: int = 0
    """PNG objects of the bulk stage."""
    packed_parts: int = 0
    """Parquet parts with the pictures' metadata, and with the pictures themselves where they are packed."""
    concepts_per_hour: float | None = None
    """Rate of this run over its whole time."""
    recent_per_hour: float | None = None
    """Rate of the last half hour, while the run learns."""
    seconds_left: float | None = None
    """Time until all concepts are learned, at the recent rate."""
    median_s: float | None = None
    slowest: list[AttemptInfo] = field(default_factory=list)
    unread: int = 0
    """Concepts whose records were not read: `slowest`, `median_s` and `causes` leave them out."""
    causes: list[Cause] = field(default_factory=list)
    """Failures by kind and cause, the most frequent first."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Errors that are no concept's, by stage."""


def read_status(store: RunStore, clock: float | None = None) -> RunStatus:
    """Read the state of a run. `clock` is the time now, in seconds since 1970. Raises ValueError if there is no run."""
    clock = time.time() if clock is None else clock
    status = RunStatus(output=store.root)
    states: dict[str, ConceptState] = {}
    top_level: dict[str, float] = {}
    newest = 0.0
    listing = ConceptListing()
    for each in store.scan_objects():
        listing.add(each)
        path, at = each.path, each.written_at
        folder = ConceptFolder.from_path(path)
        newest = max(newest, at)
        if folder is not None:
            _update_state(states, folder, path, each.num_bytes, at)
            status.below_gate += path == folder.ladder
        elif path.startswith("images/") and path.endswith(".png"):
            status.pictures += 1
        elif path.startswith("images/metadata/"):
            status.packed_parts += 1
        elif "/" not in path:
            top_level[path] = at
    if not states and RUN_FILE not in top_level:
        raise ValueError(no_run_message(store))
    run = read_run(store) if RUN_FILE in top_level else {}
    started = _timestamp(run.get("started_at"))
    _describe_run(status, run, newest, clock)
    _set_damaged_apart(status, states, find_damaged(store, listing, _MAX_RECORDS), started)
    _count_states(status, run, states, started)
    _measure_rate(status, states, started, clock)
    results = _read_results(store) if _RESULTS in top_level else {}
    _describe_attempts(store, status, states, started, results, top_level.get(_RESULTS, 0.0))
    return status


def no_run_message(store: RunStore) -> str:
    """Return the error for an output without a run."""
    return (
        f"no run at {store.root}: neither {RUN_FILE} nor concepts/ is there; give the --output of a run, as its last "
        "lines and its report name it"
    )


def _update_state(states: dict[str, ConceptState], folder: ConceptFolder, path: str, size: int, at: float) -> None:
    """Take in one object. The newest object of a concept counts, but a record outlives its own checkpoint."""
    statuses: dict[str, Literal["done", "failed", "learning"]] = {
        folder.record: "done",
        folder.failure: "failed",
        folder.checkpoint: "learning",
    }
    if path not in statuses or not size:
        return
    status = statuses[path]
    before = states.get(folder.concept_id)
    if before is not None and before.fingerprint == folder.fingerprint and "done" in (status, before.status):
        is_newer = status == "done"
    else:
        is_newer = before is None or at >= before.at
    if is_newer:
        states[folder.concept_id] = ConceptState(folder.fingerprint, status, at)


def _describe_run(status: RunStatus, run: Mapping[str, Any], newest: float, clock: float) -> None:
    """Set what `run.json` says, and whether the run is alive. `newest` is the time of the last write."""
    counts = run.get("counts", {})
    status.stage = run.get("stage")
    status.started_at = run.get("started_at")
    status.manifest = run.get("config", {}).get("manifest")
    status.rows = counts.get("rows")
    status.looked_at = counts.get("looked_at")
    status.left_out = counts.get("left_out", 0)
    status.bad_rows = counts.get("bad_rows", 0)
    if status.started_at:  # without it, this run's records cannot be distinguished from earlier ones
        status.done_before = counts.get("done_before", 0)
    status.problems = counts.get("problems", {})
    status.last_write_at = datetime.datetime.fromtimestamp(newest, datetime.UTC).isoformat(timespec="seconds")
    status.quiet_s = max(0.0, clock - newest)
    status.alive = status.stage in ("learning", "drawing", "reporting") and status.quiet_s < _QUIET_S


def _set_damaged_apart(
    status: RunStatus, states: dict[str, ConceptState], damages: Mapping[str, str], started: float
) -> None:
    """Move concepts whose result is damaged from `states` to `status.damaged`."""
    for concept_id, state in list(states.items()):
        if state.status == "done" and state.fingerprint in damages:
            status.damaged[concept_id] = damages[state.fingerprint]
            status.done_before = max(0, status.done_before - (state.at < started))
            del states[concept_id]


def _count_states(
    status: RunStatus, run: Mapping[str, Any], states: Mapping[str, ConceptState], started: float
) -> None:
    """Count concepts by their state, this run's apart from earlier ones'."""
    kinds = [(state.status, state.at >= started) for state in states.values()]
    in_run = kinds.count(("done", True))
    earlier = kinds.count(("done", False))
    # A concept without tries left has a new record, but is not newly learned.
    tried_again = run.get("counts", {}).get("gate", {}).get("learned_before", 0)
    status.done = in_run + max(0, status.done_before - tried_again)
    status.other = max(0, earlier - status.done_before)
    status.failed = kinds.count(("failed", True))
    status.failed_before = kinds.count(("failed", False))
    learning = kinds.count(("learning", True))
    status.learning = learning if status.alive else 0
    status.interrupted = kinds.count(("learning", False)) + learning - status.learning
    if status.rows is not None and "looked_at" in run.get("counts", {}):
        settled = status.done + status.failed + len(status.damaged) + status.bad_rows + status.left_out
        status.waiting = max(0, status.rows - settled - status.learning)


def _measure_rate(status: RunStatus, states: Mapping[str, ConceptState], started: float, clock: float) -> None:
    """Set the rates and the time left, from the times at which this run's records were written."""
    times = [state.at for state in states.values() if state.status == "done" and state.at >= started]
    if not times:
        return
    is_learning = status.alive and status.stage == "learning"
    began = started or min(times)
    end = clock if is_learning else max(times)
    if end > began:
        status.concepts_per_hour = round(3600 * len(times) / (end - began), 1)
    if not is_learning:
        return
    window = min(_RECENT_S, end - began)
    num_recent = sum(at > end - window for at in times)
    if num_recent and window > 0:
        status.recent_per_hour = round(3600 * num_recent / window, 1)
        status.seconds_left = round(((status.waiting or 0) + status.learning) * window / num_recent)


def _read_results(store: RunStore) -> dict[str, AttemptInfo]:
    """Read the last results: fingerprint -> attempt; a bad row has a key that begins with `_BAD_ROW`.

    Raises ValueError if they cannot be read.
    """
    import pyarrow as pa

    from pipeline.store.parquet import read_table

    columns = ["fingerprint", "concept_id", "error", "seconds", "steps", "attempts"]
    try:
        with open_for_reading(store.uri(_RESULTS)) as file:
            try:
                rows = read_table(file, [*columns, "error_kind"]).to_pylist()
            except pa.ArrowInvalid:  # results of an earlier release have no kinds
                file.seek(0)
                rows = read_table(file, columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{store.uri(_RESULTS)} cannot be read ({error}); the next run writes another") from error
    return {
        row["fingerprint"] or f"{_BAD_ROW}{number}": AttemptInfo(
            concept_id=row["concept_id"] or "unnamed",
            error=row["error"] or "",
            error_kind=row.get("error_kind") or ("" if row["fingerprint"] else BAD_INPUT),
            seconds=row["seconds"] or 0.0,
            steps=row["steps"] or 0,
            attempts=row["attempts"] or 1,
        )
        for number, row in enumerate(rows)
    }


def _describe_attempts(
    store: RunStore,
    status: RunStatus,
    states: Mapping[str, ConceptState],
    started: float,
    results: Mapping[str, AttemptInfo],
    results_at: float,
) -> None:
    """Set the slowest concepts, the median time and the causes of failures.

    `results` are the last results, by fingerprint, and `results_at` the time at which they were written.
    """
    wanted = _attempts_to_describe(states, started)
    known = {
        concept_id: results[state.fingerprint]
        for concept_id, state in wanted.items()
        if state.fingerprint in results and state.at <= results_at
    }
    to_read = pick_records({concept_id: state for concept_id, state in wanted.items() if concept_id not in known})
    known |= _read_records(store, to_read)
    status.unread = len(wanted) - len(known)
    done = [attempt for concept_id, attempt in known.items() if wanted[concept_id].status == "done" and attempt.seconds]
    status.slowest = sorted(done, key=lambda attempt: -attempt.seconds)[:_SLOWEST]
    status.median_s = round(statistics.median(attempt.seconds for attempt in done), 1) if done else None
    failed = [attempt for concept_id, attempt in known.items() if wanted[concept_id].status == "failed"]
    bad_rows = [attempt for key, attempt in results.items() if key.startswith(_BAD_ROW)]
    status.causes = group_failures(failed + (bad_rows if results_at >= started else []))


def _attempts_to_describe(states: Mapping[str, ConceptState], started: float) -> dict[str, ConceptState]:
    """Return the concepts that failed or that this run learned; if it learned none, all that are done or failed."""
    ended = {concept_id: state for concept_id, state in states.items() if state.status != "learning"}
    in_run = {
        concept_id: state for concept_id, state in ended.items() if state.status == "failed" or state.at >= started
    }
    return in_run if any(state.status == "done" for state in in_run.values()) else ended


def pick_records(states: Mapping[str, ConceptState]) -> dict[str, ConceptState]:
    """Pick the concepts whose records are read: failures first, as there are few of them, then the newest."""
    order = sorted(states, key=lambda concept_id: (states[concept_id].status != "failed", -states[concept_id].at))
    return {concept_id: states[concept_id] for concept_id in order[:_MAX_RECORDS]}


def group_failures(attempts: Iterable[AttemptInfo]) -> list[Cause]:
    """Return the causes of failed attempts, the most frequent first."""
    return find_causes(
        [(attempt.error_kind, attempt.concept_id, attempt.concept_id, attempt.error) for attempt in attempts]
    )


def _read_records(store: RunStore, states: Mapping[str, ConceptState]) -> dict[str, AttemptInfo]:
    """Read the records or failures of these states, by concept id; one that was replaced meanwhile is left out."""
    concept_ids = {}
    for concept_id, state in states.items():
        folder = ConceptFolder(concept_id, state.fingerprint)
        concept_ids[folder.record if state.status == "done" else folder.failure] = concept_id
    attempts = {}
    for path, content in store.get_many(concept_ids).items():
        if not isinstance(content, bytes):
            continue
        record = record_or_failure(path, content)
        attempts[concept_ids[path]] = AttemptInfo(
            concept_id=record.concept_id,
            error=record.error,
            error_kind=record.error_kind,
            seconds=record.seconds,
            steps=record.steps,
            attempts=record.attempts,
        )
    return attempts


def _timestamp(iso: str | None) -> float:
    """Return a time in seconds since 1970; 0 for None."""
    return datetime.datetime.fromisoformat(iso).timestamp() if iso else 0.0
