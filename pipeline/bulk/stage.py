"""A pass of Ray Data over a run: rows of a Parquet plan -> rows of results, made by actors that hold a model.

The results are the record of what is done. Every row has a `row_id` made of what its result depends on, a `status` and
an `error`; those that say `ok` are left out of the next plan.
"""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import LogFormat, RunConfig
from pipeline.report.progress import Progress
from pipeline.store.storage import RunStore, hand_over, open_for_reading

log = logging.getLogger(__name__)

_PLAN_ROWS = 65_536
_LOOK_EVERY_S = 5.0
_RETRIES, _RESTARTS = 3, 30
"""Of a part's rows, which one of them may end each time; of an actor, which in a long stage meets more deaths than any
row. Ray's own default is for ever: a row that kills, or an actor that dies as it starts, would never end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What is done to the rows, and where they are."""

    name: str
    """In progress lines."""
    plan: str
    """The plan's folder in the run."""
    results: str
    """The results' folder."""
    worker: Callable[[RunConfig], Callable[[pa.Table], pa.Table]]
    """Class of the actors: made once with the configuration, then called with a batch of plan rows."""
    rows_per_call: int
    rows_per_part: int
    """Rows of one Parquet part of the results; a finished part is not made again on the next run."""
    calls_at_once: int = 1
    """Whose rows come in one call, at most, where a part has as many: a worker may store the first while it makes the
    next."""


def put_plan(store: RunStore, folder: str, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    """Write a plan in parts, and remove the parts that an earlier one had more."""
    paths = set[str]()
    while part := list(islice(rows, _PLAN_ROWS)):
        path = f"{folder}/part-{len(paths):05d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, schema), buffer)
        store.put(path, buffer.getvalue())
        paths.add(path)
    for stale in set(store.list(folder)) - paths:
        store.delete(stale)


def run_stage(config: RunConfig, stage: Stage, num_rows: int, gpus: float) -> None:
    """Read the plan, work, write the results: one Ray Data pipeline. `gpus`: in the cluster; 0 works on CPUs."""
    import ray  # here, as what is done is read without it, too

    store = RunStore(config.output)
    plan_fs, plan_path = hand_over(store.uri(stage.plan))
    results_fs, results_path = hand_over(store.uri(stage.results))
    num_calls = math.ceil(num_rows / stage.rows_per_call)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = min(config.actors.count or int(gpus) or cpus, num_calls)
    rows_per_block = min(stage.rows_per_part, math.ceil(num_calls / size) * stage.rows_per_call)
    at_once = max(1, min(stage.calls_at_once, rows_per_block // stage.rows_per_call))  # more would merge blocks
    actor_cpus = cpus_for_actor([node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]], size)
    settings = replace(config, device="cuda" if gpus else "cpu")
    plan_files = math.ceil(num_rows / _PLAN_ROWS)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # twenty lines every ten seconds in a job's log
    context.use_datasource_v2 = False  # it starts 32 actors, each in need of a core, to read the plan files' footers
    with _reporting(store, stage, num_rows, rows_per_block, config.log_format):
        (
            ray.data.read_parquet(
                plan_path, filesystem=plan_fs, num_cpus=min(1, actor_cpus), override_num_blocks=plan_files
            )
            .repartition(target_num_rows_per_block=rows_per_block)
            .map_batches(
                stage.worker,
                batch_size=stage.rows_per_call * at_once,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=size),
                fn_constructor_args=[settings],
                num_cpus=actor_cpus,
                num_gpus=config.actors.gpus if gpus else None,
                max_restarts=_RESTARTS,
                max_task_retries=_RETRIES,
                udf_modifying_row_count=False,
            )
            .write_parquet(results_path, filesystem=results_fs)
        )


def cpus_for_actor(nodes: Sequence[float], actors: int) -> float:
    """Cores each actor reserves, given those of every node: half a one, or less, so that a whole core is left on every
    node that has any. Reading, splitting and writing are tasks of a whole core each, and would starve."""
    return min(0.5, max(0.0, sum(nodes) - sum(cores > 0 for cores in nodes)) / actors)


@contextmanager
def _reporting(
    store: RunStore, stage: Stage, num_rows: int, rows_per_part: int, log_format: LogFormat
) -> Iterator[None]:
    """Progress lines while the block runs, from the number of finished parts."""
    progress = Progress(stage.name, total=lambda: num_rows, log_format=log_format)
    before = len(store.list(stage.results))
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            try:
                parts = len(store.list(stage.results)) - before
            except OSError as error:
                log.warning("cannot look how far %s is: %s", stage.name, error)
                continue
            progress.update(done=min(num_rows, parts * rows_per_part))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def finished_rows(store: RunStore, results: str) -> set[str]:
    """Ids of the rows that went well. A part cut short by a crash is removed: its rows are done again."""
    parts = read_results(store, results, ["row_id", "status"])
    return {row["row_id"] for rows in parts for row in rows if row["status"] == "ok"}


def first_errors(store: RunStore, results: str, missing: set[str], at_most: int = 5) -> tuple[str, ...]:
    """Causes of rows that have no result, a few distinct ones."""
    parts = read_results(store, results, ["row_id", "error"])
    causes = (row["error"] for rows in parts for row in rows if row["row_id"] in missing and row["error"])
    return tuple(islice(dict.fromkeys(causes), at_most))


def read_results(store: RunStore, results: str, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of every whole part, part by part."""
    for path in sorted(store.list(results)):
        try:
            with open_for_reading(store.uri(path)) as file:
                table = pq.read_table(file, columns=columns)
        except pa.ArrowInvalid as error:
            log.warning("%s is not whole (%s): removed", store.uri(path), error)
            store.delete(path)
            continue
        yield table.to_pylist()
