"""One pass of Ray Data over a run: rows of a Parquet plan -> rows of results, made by workers that hold
a model or borrow an actor that does."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.bulk.quiet import quiet_ray_data
from pipeline.bulk.rows import PLAN_PART_ROWS
from pipeline.config import LogFormat, RunConfig
from pipeline.report.progress import Progress
from pipeline.store.addresses import filesystem_for_workers
from pipeline.store.storage import RunStore

if TYPE_CHECKING:
    from pipeline.fleet import Fleet

log = logging.getLogger(__name__)

_COUNT_EVERY_S = 5.0

_FREE_CORE_S = 60.0
"""Longest wait for a free core before Ray Data begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The work on the rows, and where the rows are."""

    name: str
    """The stage's name in progress lines."""

    plan: str
    """Folder of the plan, a path in the run's output."""

    results: str
    """Folder of the results, a path in the run's output."""

    worker: Callable[[RunConfig], Callable[[pa.Table], pa.Table]]
    """Class of the workers: made once with the configuration, then called with one batch of plan rows after another."""

    rows_per_call: int

    rows_per_part: int
    """Rows of one Parquet part of the results; a finished part is not made again by the next run."""

    calls_at_once: int = 1
    """Largest number of calls whose rows are given to a worker as one batch, where a part has as many: a worker may
    store the results of the first while it makes those of the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSizes:
    """The division of a stage's rows among actors and blocks."""

    num_actors: int
    cpus_per_actor: float
    rows_per_block: int
    """Rows of one Ray Data block, which becomes one part of the results."""
    rows_per_batch: int
    """Rows that a worker is called with."""
    plan_parts: int


def stage_sizes(
    stage: Stage, num_rows: int, *, actors_asked: int, gpus: float, cpus: float, node_cpus: Sequence[float]
) -> StageSizes:
    """Divide `num_rows` among actors and blocks.

    `actors_asked` is `actors.count`, 0 for one actor on each GPU or, without GPUs, on each core. `gpus` and `cpus` are
    those of the whole cluster, `node_cpus` the cores of every node that is alive.
    """
    num_calls = math.ceil(num_rows / stage.rows_per_call)
    num_actors = min(actors_asked or int(gpus) or int(cpus), num_calls)
    rows_per_block = min(stage.rows_per_part, math.ceil(num_calls / num_actors) * stage.rows_per_call)
    calls_at_once = max(1, min(stage.calls_at_once, rows_per_block // stage.rows_per_call))  # more would merge blocks
    return StageSizes(
        num_actors=num_actors,
        cpus_per_actor=cpus_for_actor(node_cpus, num_actors),
        rows_per_block=rows_per_block,
        rows_per_batch=stage.rows_per_call * calls_at_once,
        plan_parts=math.ceil(num_rows / PLAN_PART_ROWS),
    )


def cpus_for_actor(node_cpus: Sequence[float], num_actors: int) -> float:
    """Return the cores that each actor reserves, 0.5 at most, so that every node with cores keeps a whole one free.

    Reading, splitting and writing are tasks that need a whole core each; without a free one they would never start.
    """
    num_nodes = sum(cores > 0 for cores in node_cpus)
    return min(0.5, max(0.0, sum(node_cpus) - num_nodes) / num_actors)


def run_stage(config: RunConfig, stage: Stage, num_rows: int, gpus: float, fleet: Fleet | None = None) -> None:
    """Read the plan, work on its rows and write the results, as one Ray Data pipeline.

    `gpus` is the cluster's number; with 0 the workers work on CPUs. `fleet` has the actors that the workers borrow, and
    which alone hold cores and devices. Raises Ray's errors when the stage cannot go on, and ClusterLost if no actor
    starts, or none is left, for as long as `actor_wait.ActorWait` allows.
    """
    import ray  # here, because planning and reading results need no Ray

    from pipeline.actor_wait import ActorWait, ending_without_actors, living_nodes, num_alive
    from pipeline.bulk.deaths import STARTS_PER_ACTOR, BoundedWorker, DeathCounter, on_this_node

    store = RunStore(config.output)
    plan_filesystem, plan_path = filesystem_for_workers(store.uri(stage.plan))
    results_filesystem, results_path = filesystem_for_workers(store.uri(stage.results))
    sizes = stage_sizes(
        stage,
        num_rows,
        actors_asked=fleet.max_actors() if fleet else config.actors.count,
        gpus=gpus,
        cpus=ray.cluster_resources().get("CPU", 1),
        node_cpus=[node.get("CPU", 0.0) for node in living_nodes()],
    )
    worker_config = replace(config, device="cuda" if gpus else "cpu")
    bounds = (ray.cloudpickle.dumps(stage.worker), on_this_node(DeathCounter), STARTS_PER_ACTOR * sizes.num_actors)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the bars write twenty lines every ten seconds into a job's log
    context.use_datasource_v2 = False  # v2 starts 32 actors, each in need of a core, to read the plan files' footers
    num_cpus = 0.0 if fleet else sizes.cpus_per_actor
    num_gpus = config.actors.gpus if gpus and not fleet else 0
    wait = ActorWait(fleet.policy.needs if fleet else {"CPU": num_cpus, "GPU": num_gpus}, config.actors.start_s)
    num_ready = (lambda: len(fleet.ready())) if fleet else partial(num_alive, BoundedWorker.__name__)
    with (
        quiet_ray_data(),
        _progress_lines(store, stage, num_rows, sizes.rows_per_block, config.log_format),
        ending_without_actors(wait, num_ready),
    ):
        plan = ray.data.read_parquet(
            plan_path, filesystem=plan_filesystem, num_cpus=num_cpus, override_num_blocks=sizes.plan_parts
        )
        await_free_core(lambda: ray.available_resources().get("CPU", 0.0))
        (
            plan.repartition(target_num_rows_per_block=sizes.rows_per_block)
            .map_batches(
                BoundedWorker,
                batch_size=sizes.rows_per_batch,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=sizes.num_actors),
                fn_constructor_args=[worker_config, *bounds],
                num_cpus=num_cpus,
                num_gpus=num_gpus or None,
                udf_modifying_row_count=False,
            )
            .write_parquet(results_path, filesystem=results_filesystem)
        )


def await_free_core(free_cores: Callable[[], float], longest_s: float = _FREE_CORE_S) -> None:
    """Wait until a core is free, and warn if none is after `longest_s`: Ray Data's tasks, which split the plan and
    write the results, need one. Its own reading of the plan's footers may hold the last one for a moment."""
    until = time.monotonic() + longest_s
    while not free_cores():
        if time.monotonic() >= until:
            log.warning(
                "no core of the cluster was free for %.0f s: nothing is drawn or scored before other work ends or a "
                "node joins",
                longest_s,
            )
            return
        time.sleep(0.1)


@contextmanager
def _progress_lines(
    store: RunStore, stage: Stage, num_rows: int, rows_per_part: int, log_format: LogFormat
) -> Iterator[None]:
    """Write progress lines while the block runs, from the number of parts that the results have."""
    progress = Progress(stage.name, total=lambda: num_rows, log_format=log_format)
    parts_before = len(store.list(stage.results))
    is_over = threading.Event()

    def count(*, final: bool = False) -> None:
        try:
            new_parts = len(store.list(stage.results)) - parts_before
        except OSError as error:
            log.warning("cannot count the finished parts of %s: %s", stage.name, error)
            return
        progress.update(done=min(num_rows, new_parts * rows_per_part), final=final)

    def watch() -> None:
        while not is_over.wait(_COUNT_EVERY_S):
            count()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        count(final=True)
        progress.close()
