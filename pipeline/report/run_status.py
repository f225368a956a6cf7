"""What a run's output holds and how far it is, from one listing.

Records are read only where the last results.parquet does not tell of them, the newest few hundred at most.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.records import from_json
from pipeline.report.overview import Cause, by_cause
from pipeline.store.addresses import open_for_reading
from pipeline.store.storage import ConceptFolder, RunStore

_RESULTS, _RUN = "results.parquet", "run.json"
_MOST_READ = 500
"""Records that are read one by one."""
_QUIET_S = 600.0
"""A run that has written nothing for so long is taken for dead."""
_RECENT_S = 1800.0
_SLOWEST = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptInfo:
    """What is known of one attempt at a concept beside its place."""

    concept_id: str
    error: str = ""
    seconds: float = 0.0
    steps: int = 0
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class ConceptState:
    """The newest that happened to a concept."""

    fingerprint: str
    kind: str
    """`done`, `failed` or `learning`."""
    at: float
    """When its object was written; seconds since 1970, by the store's clock."""


@dataclass(kw_only=True)
class RunStatus:
    """Counts are of concepts unless they say otherwise. Times are UTC, ISO 8601; what is not known is None."""

    output: str
    stage: str | None = None
    """`learning`, `drawing`, `reporting`, `ended`, `stopped`; None for a run that did not say."""
    alive: bool = False
    """Whether it is at work: not ended, and something was written in the last ten minutes."""
    started_at: str | None = None
    last_write_at: str | None = None
    quiet_s: float = 0.0
    """Seconds since then."""
    manifest: str | None = None
    rows: int | None = None
    """In the manifest."""
    looked_at: int | None = None
    """Rows that the run has compared with the records so far."""
    done: int = 0
    """With a result for the present photos, row and settings: those of this run, and those it found."""
    done_before: int = 0
    """Of these, those it found."""
    failed: int = 0
    failed_before: int = 0
    """In an earlier run, and not tried by this one, or not yet."""
    bad_rows: int = 0
    learning: int = 0
    """With a checkpoint and no result."""
    interrupted: int = 0
    """The same, but nobody goes on with them: they will be resumed."""
    below_gate: int = 0
    """Of the done: below the quality gate, and to be tried again by this run or the next."""
    waiting: int | None = None
    left_out: int = 0
    """By --only, --limit or --retry."""
    other: int = 0
    """With results of an earlier run only, which the present run has not found to be done."""
    pictures: int = 0
    """PNG objects of the bulk stage."""
    packed_parts: int = 0
    """Parquet parts with pictures' metadata, or with the pictures themselves where they are packed."""
    concepts_per_hour: float | None = None
    """Finished by this run, over its whole time."""
    recent_per_hour: float | None = None
    """The same in the last half hour, while it goes on."""
    seconds_left: float | None = None
    """Until all is learned, at the recent rate."""
    median_s: float | None = None
    slowest: list[AttemptInfo] = field(default_factory=list)
    unread: int = 0
    """Finished concepts that the slowest and the median leave out, failed ones whose cause is not told."""
    causes: list[Cause] = field(default_factory=list)
    problems: Mapping[str, str] = field(default_factory=dict)
    """What went wrong besides concepts: stage -> cause."""


def read_status(store: RunStore, clock: float | None = None) -> RunStatus:
    """What the run's objects say. `clock`: the time now, seconds since 1970. Raises ValueError if there is no run."""
    clock = time.time() if clock is None else clock
    states: dict[str, ConceptState] = {}
    status, written, newest = RunStatus(output=store.root), dict[str, float](), 0.0
    for path, size, at in store.scan_with_times():
        folder = ConceptFolder.from_path(path)
        newest = max(newest, at)
        if folder is not None:
            _note(states, folder, path, size, at)
            status.below_gate += path == folder.ladder
        elif path.startswith("images/") and path.endswith(".png"):
            status.pictures += 1
        elif path.startswith("images/metadata/"):
            status.packed_parts += 1
        elif "/" not in path:
            written[path] = at
    if not states and _RUN not in written:
        raise ValueError(no_run(store))
    run = read_run(store) if _RUN in written else {}
    _describe_run(status, run, newest, clock)
    since = _seconds(run.get("started_at"))
    _count(status, run, states, since)
    _pace(status, states, since, clock)
    of_results = _results(store) if _RESULTS in written else {}
    _tell(store, status, states, since, of_results, written.get(_RESULTS, 0.0))
    return status


def no_run(store: RunStore) -> str:
    """The error for an output that is none."""
    return (
        f"no run at {store.root}: neither {_RUN} nor concepts/ is there; give the --output of a run, as its last lines "
        "and its report name it"
    )


def read_run(store: RunStore) -> dict[str, Any]:
    """`run.json`. Raises ValueError if it is none, FileNotFoundError if it is not there."""
    try:
        run = json.loads(store.get(_RUN))
    except ValueError as error:
        raise ValueError(f"{store.uri(_RUN)} is not JSON ({error}); delete it, the next run writes another") from error
    return dict(run)


def _note(states: dict[str, ConceptState], folder: ConceptFolder, path: str, size: int, at: float) -> None:
    """Take in one object: the newest of a concept counts, and a record ends what its checkpoint was for."""
    kinds = {folder.record: "done", folder.failure: "failed", folder.checkpoint: "learning"}
    kind = kinds.get(path, "") if size else ""
    if not kind:
        return
    before = states.get(folder.concept_id)
    if before is not None and before.fingerprint == folder.fingerprint and "done" in (kind, before.kind):
        is_newer = kind == "done"
    else:
        is_newer = before is None or at >= before.at
    if is_newer:
        states[folder.concept_id] = ConceptState(folder.fingerprint, kind, at)


def _describe_run(status: RunStatus, run: Mapping[str, Any], newest: float, clock: float) -> None:
    counts = run.get("counts", {})
    status.stage, status.started_at = run.get("stage"), run.get("started_at")
    status.manifest, status.rows = run.get("config", {}).get("manifest"), counts.get("rows")
    status.looked_at, status.left_out = counts.get("looked_at"), counts.get("left_out", 0)
    status.bad_rows = counts.get("bad_rows", 0)
    if status.started_at:  # else this run's records cannot be told from those it found
        status.done_before = counts.get("done_before", 0)
    status.problems = counts.get("problems", {})
    status.last_write_at = datetime.datetime.fromtimestamp(newest, datetime.UTC).isoformat(timespec="seconds")
    status.quiet_s = max(0.0, clock - newest)
    status.alive = status.stage in ("learning", "drawing", "reporting") and status.quiet_s < _QUIET_S


def _count(status: RunStatus, run: Mapping[str, Any], states: Mapping[str, ConceptState], since: float) -> None:
    kinds = [(state.kind, state.at >= since) for state in states.values()]
    in_run, earlier = kinds.count(("done", True)), kinds.count(("done", False))
    # those tried again to their ladder's end have a new record, and are no new ones
    tried_again = run.get("counts", {}).get("gate", {}).get("learned_before", 0)
    status.done = in_run + max(0, status.done_before - tried_again)
    status.other = max(0, earlier - status.done_before)
    status.failed, status.failed_before = kinds.count(("failed", True)), kinds.count(("failed", False))
    learning = kinds.count(("learning", True))
    status.learning = learning if status.alive else 0
    status.interrupted = kinds.count(("learning", False)) + learning - status.learning
    if status.rows is not None and "looked_at" in run.get("counts", {}):
        settled = status.done + status.failed + status.bad_rows + status.left_out
        status.waiting = max(0, status.rows - settled - status.learning)


def _pace(status: RunStatus, states: Mapping[str, ConceptState], since: float, clock: float) -> None:
    times = [state.at for state in states.values() if state.kind == "done" and state.at >= since]
    if not times:
        return
    began, end = since or min(times), clock if status.alive and status.stage == "learning" else max(times)
    if end > began:
        status.concepts_per_hour = round(3600 * len(times) / (end - began), 1)
    if not status.alive or status.stage != "learning":
        return
    window = min(_RECENT_S, end - began)
    recent = sum(at > end - window for at in times)
    if recent and window > 0:
        status.recent_per_hour = round(3600 * recent / window, 1)
        status.seconds_left = round(((status.waiting or 0) + status.learning) * window / recent)


def _results(store: RunStore) -> dict[str, AttemptInfo]:
    """Fingerprint -> what the last results say; bad rows under a name of their own each."""
    import pyarrow as pa

    from pipeline.store.parquet import read_table

    columns = ["fingerprint", "concept_id", "error", "seconds", "steps", "attempts"]
    try:
        with open_for_reading(store.uri(_RESULTS)) as file:
            rows = read_table(file, columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{store.uri(_RESULTS)} cannot be read ({error}); the next run writes another") from error
    return {
        row["fingerprint"] or f"row {number}": AttemptInfo(
            concept_id=row["concept_id"] or "unnamed", error=row["error"] or "", seconds=row["seconds"] or 0.0,
            steps=row["steps"] or 0, attempts=row["attempts"] or 1,
        )
        for number, row in enumerate(rows)
    }  # fmt: skip


def _tell(
    store: RunStore, status: RunStatus, states: Mapping[str, ConceptState], since: float,
    of_results: Mapping[str, AttemptInfo], results_at: float,
) -> None:  # fmt: skip
    """The slowest, and failures by cause."""
    ended = {name: state for name, state in states.items() if state.kind != "learning"}
    in_run = {name: state for name, state in ended.items() if state.kind == "failed" or state.at >= since}
    asked = in_run if any(state.kind == "done" for state in in_run.values()) else ended
    known = {
        name: of_results[state.fingerprint]
        for name, state in asked.items()
        if state.fingerprint in of_results and state.at <= results_at
    }
    missing = sorted((name for name in asked if name not in known), key=lambda name: -asked[name].at)
    # Failures first: there are few, and they are what one comes for.
    missing.sort(key=lambda name: asked[name].kind != "failed")
    known |= _read(store, {name: asked[name] for name in missing[:_MOST_READ]})
    status.unread = len(asked) - len(known)
    done = [facts for name, facts in known.items() if asked[name].kind == "done" and facts.seconds]
    status.slowest = sorted(done, key=lambda facts: -facts.seconds)[:_SLOWEST]
    status.median_s = round(statistics.median(facts.seconds for facts in done), 1) if done else None
    failures = [(name, name, facts.error) for name, facts in known.items() if asked[name].kind == "failed"]
    if results_at >= since:
        bad = (facts for key, facts in of_results.items() if key.startswith("row "))
        failures += [(facts.concept_id, facts.concept_id, facts.error) for facts in bad]
    status.causes = by_cause(failures)


def _read(store: RunStore, states: Mapping[str, ConceptState]) -> dict[str, AttemptInfo]:
    paths = {}
    for name, state in states.items():
        folder = ConceptFolder(name, state.fingerprint)
        paths[folder.record if state.kind == "done" else folder.failure] = name
    facts = {}
    for path, content in store.get_many(paths).items():
        try:
            record = from_json(content) if isinstance(content, bytes) else None
        except ValueError as error:
            facts[paths[path]] = AttemptInfo(
                concept_id=paths[path], error=f"{path} cannot be read ({error}); delete it"
            )
            continue
        if record is not None:  # else it was replaced since the listing
            facts[paths[path]] = AttemptInfo(concept_id=record.concept_id, error=record.error, seconds=record.seconds,
                                       steps=record.steps, attempts=record.attempts)  # fmt: skip
    return facts


def _seconds(moment: str | None) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp() if moment else 0.0
