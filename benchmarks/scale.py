"""Measure what a million concepts cost the driver besides the learning: time, CPU time and peak memory of planning, of
the copies of the records, of finding out what is done, of the report, and of the plan of bulk pictures.

    python -m benchmarks.scale --concepts 100000
    python -m benchmarks.scale --concepts 1000000 --only plan list resume report

Each measurement runs in a process of its own. The output is on an S3 server on this machine, in another process, whose
objects are made up (`benchmarks/made_up_store.py`): five a concept, with a record of three photos, scores and settings.
Photos' hashes are given, as a listing of S3 gives them. Plan and metadata of bulk pictures, ten a concept, are on the
local disk. CPU time is that of the measured process alone, all threads; the start of its S3 client is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.dispatch import known, write_manifest
from benchmarks.made_up_store import OUTPUT, serve
from benchmarks.timing import heading, peak_mb, say, table
from pipeline.bulk.row_keys import done_keys, plan_missing_keys
from pipeline.bulk.rows import read_parts
from pipeline.config import RunConfig
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.done import find_done
from pipeline.ledger.gate import verdict
from pipeline.ledger.key_index import KeySet
from pipeline.ledger.plan import ConceptTask, Plan
from pipeline.ledger.record_parts import PartWriter
from pipeline.ledger.records import ConceptRecord, StoredFile, add_to_part
from pipeline.report.page import RunFigures, build_report
from pipeline.sample_config import GateConfig
from pipeline.store.storage import RunStore

_CHUNK = 5000
_PROMPTS = 10
"""Prompts of which each concept has a bulk picture."""
_PICTURES, _METADATA = "pictures/plan", "pictures/metadata"
_LOG = {"log.jsonl": b"{}\n" * 40}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one piece of work took."""

    what: str
    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Peak resident memory of the process."""


@dataclass
class Watch:
    """Wall and CPU time of the blocks that it measures, added up."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> Watch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]

    def cost(self, what: str) -> Cost:
        return Cost(what, self.seconds, self.cpu_seconds, peak_mb())


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    say(
        heading(
            "Scale",
            "benchmarks.scale",
            arguments,
            concepts=f"{options.concepts:,}",
            objects=f"{5 * options.concepts:,}",
        )
    )
    from benchmarks.many import made_up_files  # here, because the measured processes need neither Ray nor torch

    files = made_up_files() | _LOG
    with tempfile.TemporaryDirectory() as name, serve(Path(name), files) as environment:
        folder = Path(name)
        manifest = write_manifest(folder / "catalog", options.concepts)
        costs = [_alone(fill, environment, str(manifest), name, files)]
        urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/open").close()
        for work in options.only:
            costs.append(_alone(WORKS[work], environment, str(manifest)))
    titles = ["what", "s", "CPU s", "µs of CPU a concept", "peak MB"]
    per_concept = 1e6 / options.concepts
    rows = [[one.what, one.seconds, one.cpu_seconds, one.cpu_seconds * per_concept, one.peak_mb] for one in costs]
    say("\n" + table(titles, rows))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="what to measure")
    return parser.parse_args(arguments)


def fill(manifest: str, folder: str, files: dict[str, bytes]) -> Cost:
    """Make the record of every concept, and store the copies as the driver does; measured is the latter."""
    watch, parts = Watch(), _NotedParts(RunStore(OUTPUT))
    fingerprints = []
    tasks = _plan().tasks(read_manifest(manifest))
    while chunk := list(islice(tasks, _CHUNK)):
        fingerprints += [task.fingerprint for task in chunk]
        records = [record_of(task, files) for task in chunk]
        with watch:
            for record in records:
                add_to_part(parts, record)
    with watch:
        parts.flush()
    (Path(folder) / "fingerprints").write_text("".join(fingerprints))
    (Path(folder) / "tags").write_bytes(b"".join(parts.tags))
    np.array(parts.sizes, np.int64).tofile(Path(folder) / "sizes")
    return watch.cost("records copied as they end")


class _NotedParts(PartWriter):
    """A writer that also notes what the store is to say of each record."""

    def __init__(self, store: RunStore) -> None:
        super().__init__(store)
        self.tags: list[bytes] = []
        self.sizes: list[int] = []

    def add_content(self, path: str, content: bytes) -> None:
        super().add_content(path, content)
        self.tags.append(hashlib.md5(content, usedforsecurity=False).digest())
        self.sizes.append(len(content))


def plan(manifest: str) -> Cost:
    """Plan with nothing done."""
    with Watch() as watch:
        planned = _plan()
        for _ in planned.tasks(read_manifest(manifest)):
            pass
    return watch.cost("plan, nothing done")


def listing(_manifest: str) -> Cost:
    """List all objects of the concepts."""
    with Watch() as watch:
        count = sum(1 for _ in RunStore(OUTPUT).scan_objects("concepts"))
    return watch.cost(f"list {count:,} objects")


def resume(manifest: str) -> Cost:
    """Find out what is done, and plan."""
    with Watch() as watch:
        planned = _done_plan(manifest)
    if planned.num_todo:
        raise ValueError(f"{planned.num_todo} concepts do not count as done")
    return watch.cost("resume, all done: listing, records, plan")


def report(manifest: str) -> Cost:
    """Make results and report."""
    planned = _done_plan(manifest)
    config = RunConfig(manifest=manifest, output=OUTPUT, extractor="", device="cpu", gate=GateConfig(ladder=()))
    with Watch() as watch:
        build_report(RunStore(OUTPUT), config, RunFigures(), planned.carried)
    return watch.cost("results and report; the peak is that of the run with its plan")


def pictures(manifest: str) -> Cost:
    """Plan bulk pictures of which none is drawn."""
    with tempfile.TemporaryDirectory() as folder, Watch() as watch:
        wanted, _ = _plan_pictures(RunStore(folder), manifest, KeySet())
    return watch.cost(f"plan of {len(wanted):,} bulk pictures, none drawn")


def drawn(manifest: str) -> Cost:
    """Plan bulk pictures of which all are drawn."""
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        _plan_pictures(store, manifest, KeySet())
        for number, ids in enumerate(_parts(store)):
            buffer = io.BytesIO()
            pq.write_table(pa.table({"row_id": ids, "status": ["ok"] * len(ids)}), buffer)
            store.put(f"{_METADATA}/{number:06d}.parquet", buffer.getvalue())
        with Watch() as watch:
            wanted, missing = _plan_pictures(store, manifest, done_keys(store, _METADATA))
    if missing:
        raise ValueError(f"{len(missing)} pictures do not count as drawn")
    return watch.cost(f"metadata and plan of {len(wanted):,} bulk pictures, all drawn")


WORKS: dict[str, Callable[[str], Cost]] = {
    "plan": plan,
    "list": listing,
    "resume": resume,
    "report": report,
    "pictures": pictures,
    "drawn": drawn,
}


def _plan_pictures(store: RunStore, manifest: str, done: KeySet) -> tuple[KeySet, KeySet]:
    """Plan the pictures that are not done; return the keys of all, and of those in the plan."""
    from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows  # here, because the other works need no torch

    records = (record_of(task, {}) for task in _plan().tasks(read_manifest(manifest)))
    prompts = [Prompt(f"a photo of {{}}, scene {number}") for number in range(_PROMPTS)]
    return plan_missing_keys(store, _PICTURES, plan_rows(RunConfig(), records, prompts), PLAN_SCHEMA, done)


def _parts(store: RunStore) -> Iterator[pa.ChunkedArray]:
    """Yield the row ids of a plan as parts of the results have them."""
    size = RunConfig().generation.rows_per_part
    for part in read_parts(store, _PICTURES, ["row_id"]):
        yield from (part["row_id"].slice(first, size) for first in range(0, len(part), size))


def _plan() -> Plan:
    return Plan("no settings", set(), known)


def _done_plan(manifest: str) -> Plan:
    done = find_done(RunStore(OUTPUT))
    planned = Plan("no settings", done.fingerprints, known, awaiting_retry=done.awaiting_retry, damaged=done.damaged)
    for _ in planned.tasks(read_manifest(manifest)):
        pass
    return planned


def record_of(task: ConceptTask, files: dict[str, bytes]) -> ConceptRecord:
    """Return a record as an actor makes it, with scores that are made up."""
    clip_i, clip_t = (byte / 255 for byte in bytes.fromhex(task.fingerprint[:4]))
    scores = {"clip_i": 0.4 + 0.5 * clip_i, "clip_t": 0.2 + 0.1 * clip_t, "clip_i_initializer": 0.402}
    concept = task.concept
    described = {
        name: StoredFile(bytes=len(data), sha256=task.fingerprint * 2)
        for name, data in files.items()
        if name not in _LOG
    }
    return ConceptRecord(
        concept_id=concept.concept_id,
        fingerprint=task.fingerprint,
        status="done",
        placeholder_token=concept.placeholder_token,
        prompt_as=concept.placeholder_token,
        initializer=concept.initializer,
        start="token, from the manifest",
        images=concept.images,
        carried=task.carried,
        inputs=task.inputs,
        steps=500,
        seconds=8.6,
        scores=scores,
        gate=verdict(scores, GateConfig()),
        finished_at="2026-01-02T03:04:05+00:00",
        files=described,
    )


def _alone(work: Callable[..., Cost], environment: dict[str, str], *arguments: object) -> Cost:
    """Return what the work costs in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=(environment,)) as pool:
        return pool.submit(work, *arguments).result()


def _prepare(environment: dict[str, str]) -> None:
    """Make a first request, so that the client's start is not measured."""
    os.environ.update(environment)
    RunStore(OUTPUT).exists("run.json")


if __name__ == "__main__":
    sys.exit(main())
