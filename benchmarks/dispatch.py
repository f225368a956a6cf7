"""Measure the pipeline's own cost: concepts a second through the real driver and Ray when nothing is learned, and the
time and memory of planning.

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --concepts 0 --rows 1000000
    python -m benchmarks.dispatch --output s3://bucket/folder --rows 0
    python -m benchmarks.dispatch --run output/demo

Actors are stand-ins (`benchmarks/stand_ins.py`). `empty` ones answer at once; `storing` ones first store a concept's
files, log and record, in a temporary folder on the local disk or below `--output`, and check them. All is measured
after the first fifth of the concepts, when all actors have started. Planning means reading the manifest, checking rows
and hashing fingerprints, in a fresh process each time. With `known` the photos' hashes are given, as a listing of S3
gives them for 1,000 photos a request; `hashed` reads small photos from the local disk (some hundred rows that share one
read it once). `--run` examines a finished run instead: the share of its actors' time in which their engines were
learning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.stand_ins import FILES, NoLearning
from benchmarks.timing import Spread, alternate, heading, parse_numbers, peak_mb, say, table
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.plan import ConceptTask, Plan
from pipeline.ledger.records import load_records
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore

PHOTOS = 512
"""Different photos in a made-up manifest, whose rows name three each."""

ROWS_PER_GROUP = 10_000

_WHOSE = ("driver", "actor")


@dataclass(frozen=True, slots=True)
class Planning:
    """Time and memory of planning once."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Peak memory of the process."""
    added_mb: float
    """Part of the peak that planning added."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    say(heading("Dispatch", "benchmarks.dispatch", arguments, actors=options.actors))
    if options.run:
        store = RunStore(absolute(options.run))
        done = [record for record in load_records(store) if record.status == "done"]
        share = engine_share(store.get(record.folder.log) for record in done)
        learning = f"{100 * share.learning:.1f} % of the actors' time until the last concept was learned"
        say(f"{len(done)} concepts: engines were learning {learning}, ")
        say(f"{100 * share.whole:.1f} % until its pictures were drawn.\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.concepts:
            say(f"{options.concepts} concepts of {sum(FILES.values()):,} bytes, {options.repetitions} repetitions\n\n")
            say(
                table(
                    ["actor", "calls in flight an actor", "concepts/s", *(f"{of}'s CPU µs a concept" for of in _WHOSE)],
                    measure_dispatch(options, Path(folder)),
                )
                + "\n"
            )
        if options.rows:
            titles = ["manifest rows", "photos", "s to plan", "CPU s", "rows/s", "peak MB", "of them for the plan"]
            say(table(titles, measure_planning(options, Path(folder))))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=5000, help="through driver and actors; 0 leaves this out")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument(
        "--capacities",
        type=parse_numbers,
        default=[3, 18, 100],
        metavar="N,N",
        help="calls an actor takes at a time: its slots and calls ahead",
    )
    parser.add_argument(
        "--output", default="", metavar="ADDRESS", help="where to store; default: a temporary folder on the local disk"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--rows",
        type=parse_numbers,
        default=[1000, 10_000, 100_000, 1_000_000],
        metavar="N,N",
        help="manifests to plan; 0 leaves this out",
    )
    parser.add_argument(
        "--hash-up-to", type=int, default=100_000, metavar="ROWS", help="larger ones: photos known only"
    )
    parser.add_argument("--run", default="", metavar="OUTPUT", help="examine a finished run in place of all this")
    options = parser.parse_args(arguments)
    options.rows = [rows for rows in options.rows if rows]
    return options


# Driver and actors


def measure_dispatch(options: argparse.Namespace, folder: Path) -> list[list[object]]:
    """Measure each kind of actor at each capacity; return the rows of the table."""
    import ray

    manifest = write_manifest(folder / "dispatch", options.concepts)
    tasks = list(Plan("no settings", set(), known).tasks(read_manifest(str(manifest))))
    works: dict[str, Callable[[], tuple[float, float, float]]] = {}
    for capacity in options.capacities:
        for kind in ("empty", "storing"):
            works[f"{kind} {capacity}"] = lambda kind=kind, capacity=capacity: rate(
                tasks, options.actors, capacity, new_output(options.output, folder) if kind == "storing" else ""
            )
    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=options.actors, include_dashboard=False, logging_level="ERROR")
    try:
        rates = alternate(works, options.repetitions, warm_up=False)
    finally:
        if started:
            ray.shutdown()
    return [[*name.split(), *map(Spread.of, zip(*each, strict=True))] for name, each in rates.items()]


def new_output(address: str, folder: Path) -> str:
    """Return an output of its own for a repetition: below the address, or in the local folder without one."""
    return f"{address}/{uuid.uuid4().hex}" if address else tempfile.mkdtemp(dir=folder)


def rate(tasks: list[ConceptTask], actors: int, capacity: int, output: str) -> tuple[float, float, float]:
    """Return concepts a second, and the driver's and the actors' CPU time for one in µs, measured after the first
    fifth."""
    import ray

    from pipeline.config import RunConfig
    from pipeline.driver import drive
    from pipeline.fleet import Fleet
    from pipeline.verdict import Policy
    from pipeline.work_queue import WorkQueue

    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1)(NoLearning)
    fleet = Fleet(lambda: actor_class.remote(capacity, output), Policy(max_actors=actors), keeps_idle=True)

    def times() -> tuple[float, float, float]:
        of_actors = sum(ray.get([worker.handle.cpu_seconds.remote() for worker in fleet.workers]))
        return time.perf_counter(), time.process_time(), of_actors

    began, number, first = times(), 0, len(tasks) // 5
    for number, _ in enumerate(drive(WorkQueue(iter(tasks)), fleet, [RunConfig()]), 1):
        if number == first:
            began = times()
    spent = [end - begin for begin, end in zip(began, times(), strict=True)]
    fleet.dismiss()
    if number < len(tasks):
        raise ValueError(f"{number} records for {len(tasks)} concepts")
    seconds, of_driver, of_actors = (each / (number - first) for each in spent)
    return 1 / seconds, 1e6 * of_driver, 1e6 * of_actors


# Planning


def measure_planning(options: argparse.Namespace, folder: Path) -> Iterable[list[object]]:
    """Measure planning for each manifest size; return the rows of the table."""
    spawn = multiprocessing.get_context("spawn")
    found: list[list[object]] = []
    for rows in options.rows:
        manifest = write_manifest(folder / f"plan-{rows}", rows)
        for photos in ("known", "hashed"):
            if photos == "hashed" and rows > options.hash_up_to:
                continue
            with ProcessPoolExecutor(1, spawn) as pool:
                plan = pool.submit(plan_once, str(manifest), rows, photos == "hashed").result()
            found.append(
                [f"{rows:,}", photos, plan.seconds, plan.cpu_seconds, rows / plan.seconds, plan.peak_mb, plan.added_mb]
            )
    return found


def plan_once(manifest: str, rows: int, hashed: bool) -> Planning:
    """Plan a manifest in this process, and measure its time and memory."""
    before = peak_mb()
    began, cpu_began = time.perf_counter(), time.process_time()
    plan = Plan("no settings", set(), content_hashes if hashed else known)
    for _ in plan.tasks(read_manifest(manifest)):
        pass
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    if plan.num_todo != rows:
        raise ValueError(f"{plan.num_todo} of {rows} rows to do; first bad row: {plan.bad[:1]}")
    return Planning(seconds, cpu_seconds, peak_mb(), peak_mb() - before)


def known(uris: Iterable[str]) -> dict[str, Any]:
    """Return a made-up content hash of each photo, in place of those of a listing."""
    return {uri: hashlib.md5(uri.encode(), usedforsecurity=False).hexdigest() for uri in uris}


def write_manifest(folder: Path, rows: int) -> Path:
    """Write a made-up catalog: three photos a concept out of `PHOTOS` small files, and one more column."""
    (folder / "photos").mkdir(parents=True)
    for number in range(PHOTOS):
        (folder / "photos" / f"{number}.png").write_bytes(number.to_bytes(2) * 5000)  # never decoded
    schema = pa.schema(
        [
            ("concept_id", pa.string()),
            ("images", pa.list_(pa.string())),
            ("initializer", pa.string()),
            ("price", pa.float64()),
        ]
    )
    path = folder / "manifest.parquet"
    bounds = [*range(0, rows, ROWS_PER_GROUP), rows]
    with pq.ParquetWriter(path, schema) as writer:
        for first, end in pairwise(bounds):
            some = range(first, end)
            columns = {
                "concept_id": [f"concept-{i:07d}" for i in some],
                "images": [[f"photos/{(3 * i + k) % PHOTOS}.png" for k in range(3)] for i in some],
                "initializer": ["cat"] * len(some),
                "price": [i / 100 for i in some],
            }
            writer.write_table(pa.table(columns, schema))
    return path


# A finished run


@dataclass(frozen=True, slots=True)
class Share:
    """Shares of the actors' time in which their engines were learning."""

    learning: float
    """Share of the time from an actor's first concept to the end of its last concept's learning."""
    whole: float
    """Share of the time to the end of its last concept's pictures, while which nothing is left to learn."""


def engine_share(logs: Iterable[bytes]) -> Share:
    """Compute the shares from the concepts' logs (`actor/concept_log.py`); attempts that did not end in the engine do
    not count as learning. Raises ValueError if no concept was learned."""
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    first: dict[tuple[str, int], float] = {}
    last: dict[tuple[str, int], float] = {}
    for lines in logs:
        actor = ("", 0)
        for told in map(json.loads, lines.splitlines()):
            at = datetime.fromisoformat(told["time"]).timestamp()
            if told["message"] == "begins":
                actor = (told["host"], told["process"])
                first[actor] = min(at, first.get(actor, at))
            elif told["message"] == "left the engine":
                spans.setdefault(actor, []).append((at - told["seconds"], at))
            last[actor] = max(at, last.get(actor, at))
    if not spans:
        raise ValueError("the run has no concepts that were learned")
    busy = sum(map(covered, spans.values()))
    learning = sum(max(end for _, end in several) - first[actor] for actor, several in spans.items())
    return Share(busy / learning, busy / sum(last[actor] - first[actor] for actor in spans))


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds covered by at least one of the spans."""
    total = 0.0
    until = -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


if __name__ == "__main__":
    sys.exit(main())
