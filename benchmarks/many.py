"""Run ten thousand concepts through everything but learning: the driver's memory over time, the time of the results and
the report, and the time of the next run.

    python -m benchmarks.many
    python -m benchmarks.many --concepts 2000 --keep output/many

The real command (plan, driver, Ray actors, records, results, report) runs on a made-up manifest. The actors are
stand-ins that store a concept's files and record (`benchmarks/stand_ins.py`); concepts below the quality gate are only
flagged. Memory is the driver process's resident memory, with Ray's client and Arrow in it, read ten times on the way.
The second run finds everything done: it lists, reads the manifest, hashes the photos and writes the report again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.dispatch import write_manifest
from benchmarks.stand_ins import FILES, StandInWithFiles
from benchmarks.timing import heading, peak_mb, say, table
from pipeline import cluster, driver, run
from pipeline.config import RunConfig
from pipeline.exit_codes import OK
from pipeline.sample_config import GateConfig

PARTS = 10
"""Number of points at which memory is read, evenly spread over the concepts."""


@dataclass
class Watch:
    """Time and memory by number of concepts finished."""

    concepts: int
    began: float = field(default_factory=time.perf_counter)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    """Concepts finished, seconds since the beginning, resident MB."""

    def watch(self, ended: Iterator[driver.Ended]) -> Iterator[driver.Ended]:
        every = max(1, self.concepts // PARTS)
        for number, each in enumerate(ended, 1):
            if number % every == 0 or number == 1:
                self.points.append((number, time.perf_counter() - self.began, resident_mb()))
            yield each


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    say(heading("Many concepts", "benchmarks.many", arguments, actors=options.actors, concepts=f"{options.concepts:,}"))
    with contextlib.ExitStack() as stack:
        folder = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        manifest = write_manifest(folder / "catalog", options.concepts)
        for number, path in enumerate(
            (folder / "catalog" / "photos").iterdir()
        ):  # otherwise the page would have no pictures
            path.write_bytes(picture(64, number))
        config = RunConfig(
            manifest=str(manifest), output=str(folder / "out"), extractor="", device="cpu", gate=GateConfig(ladder=())
        )
        watch, seconds = run_with_stand_ins(config, options, starts_ray=True)
        say(table(["finished", "s since the start", "driver's resident MB"], [list(point) for point in watch.points]))
        first = watch.points[0]
        last = watch.points[-1]
        rate = (last[0] - first[0]) / (last[1] - first[1])
        _, again = run_with_stand_ins(config, options, starts_ray=False)  # it needs no cluster
        size = {name: (folder / "out" / name).stat().st_size / 1e6 for name in ("report.html", "results.parquet")}
        rows = [
            ["concepts/s, from the first finished to the last", rate],
            ["whole run, s", seconds],
            ["of it after the last concept (results, page), s", seconds - last[1]],
            ["run again with all done, s", again],
            ["driver's peak MB, both runs", peak_mb()],
            *([f"{name}, MB", megabytes] for name, megabytes in size.items()),
        ]
        say("\n" + table(["what", "figure"], rows))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--capacity", type=int, default=18, help="calls an actor takes at a time")
    parser.add_argument("--keep", metavar="FOLDER", default="", help="leave manifest and output there")
    return parser.parse_args(arguments)


def run_with_stand_ins(config: RunConfig, options: argparse.Namespace, *, starts_ray: bool) -> tuple[Watch, float]:
    """Run the command with stand-ins, discarding its output. Return its time and memory, and the seconds of the whole
    without Ray's start."""
    import ray

    files = made_up_files()
    drive = driver.drive

    def stand_ins(*_: object) -> Callable[[], Any]:
        actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1)(StandInWithFiles)
        return lambda: actor_class.remote(options.capacity, config.output, files)

    def watched(*given: Any, **named: Any) -> Iterator[driver.Ended]:
        return watch.watch(drive(*given, **named))

    started = starts_ray and not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=options.actors, include_dashboard=False, logging_level="ERROR")
    watch = Watch(options.concepts)
    try:
        with (
            mock.patch.object(cluster, "learner_actors", stand_ins),
            mock.patch.object(driver, "drive", watched),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            code = run.run(config)
        seconds = time.perf_counter() - watch.began
    finally:
        if started:
            ray.shutdown()
    if code != OK:
        raise ValueError(f"the run ended with {code}; with --keep, its report says why")
    return watch, seconds


def made_up_files() -> dict[str, bytes]:
    """Return a concept's files as a report reads them, of about the sizes of `FILES`."""
    curve = io.BytesIO()
    steps = 500
    columns = {"step": np.arange(1, steps + 1), "loss": np.linspace(1, 0.3, steps), "norm": np.full(steps, 0.4)}
    pq.write_table(pa.table(columns), curve)
    embedding = bytes(FILES["learned_embeds.safetensors"])
    return {"learned_embeds.safetensors": embedding, "grid.png": picture(180, 0), "curve.parquet": curve.getvalue()}


def picture(side: int, seed: int) -> bytes:
    """Return a PNG that does not compress."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def resident_mb() -> float:
    """Return the current resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
