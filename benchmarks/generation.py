"""Measure pictures a second, of one concept and of a different concept in every row of a batch, against plain diffusers
batches of the same sampler.

    python -m benchmarks.generation
    python -m benchmarks.generation --model DIRECTORY --device cuda --batch-sizes 4,8,16
    python -m benchmarks.generation --stage 256

This project's side is `textual_inversion.generate`, up to decoded pictures. diffusers' side is
`StableDiffusionPipeline` with the concepts loaded into its vocabulary by `load_textual_inversion`, drawing lists of the
same prompts with the same sampler. The time to load concepts is not in diffusers' rate but in the last line; this
project loads none, because requests carry their rows. PNG encoding is in neither rate. A figure is the median of
alternating repetitions, with the lowest and highest.

`--stage` compares the bulk stage on Ray Data with a plain loop over the same rows: one actor against one process, both
storing their pictures on a local disk. The stage's rate is measured between its first and its last finished part, when
its actor has started.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from benchmarks.timing import Spread, alternate, heading, parse_numbers, say, table
from pipeline.actor.model_loading import load_model
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.generate import METADATA, PLAN, draw_plan
from pipeline.bulk.picture_rows import PLAN_SCHEMA
from pipeline.bulk.rows import put_plan
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.models import locate
from pipeline.store.storage import RunStore
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.families.sd import load_modules
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.model_files import find_model_files

PROMPT = "a photo of a {} on the beach"
WORDS_PER_LOAD = 8
"""Concepts loaded to measure the time of loading one."""


class Drawing:
    """Draws the same pictures by this project and by diffusers, and measures pictures a second."""

    def __init__(self, model: str, device: str, sampling: SamplingConfig, threads: int) -> None:
        config = load_config("", [f"device={device}"], model=model)
        self.backbone: Backbone = load_model(config)
        torch.set_num_threads(threads)
        self._sampling = sampling
        count = sampling.batch_size
        self._embeddings = [an_embedding(self.backbone, f"<new-{i}>", seed=i) for i in range(count)]
        self._plain = self.pipeline(locate(model))
        load_into(self._plain, self._embeddings)

    def pipeline(self, model: str) -> Any:
        """Load diffusers' pipeline with this project's sampler and precision."""
        solver = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[self._sampling.solver]
        dtype = self.backbone.dtype
        plain = StableDiffusionPipeline.from_pretrained(
            model, safety_checker=None, local_files_only=True, **load_modules(find_model_files(model), dtype)
        ).to(self.backbone.device, dtype)
        plain.scheduler = solver.from_config(plain.scheduler.config)
        plain.set_progress_bar_config(disable=True)
        return plain

    def ours(self, several: bool, batches: int) -> float:
        chosen = self._chosen(several)
        requests = [
            ImageRequest(PROMPT.format(embedding.placeholder_token), seed, (embedding,))
            for seed, embedding in enumerate(chosen * batches)
        ]
        return len(requests) / self._seconds(lambda: generate(self.backbone, requests, self._sampling))

    def theirs(self, several: bool, batches: int) -> float:
        prompts = [PROMPT.format(embedding.placeholder_token) for embedding in self._chosen(several)]
        guidance_scale = self._sampling.guidance_scale or self.backbone.guidance_scale

        def draw() -> None:
            for batch in range(batches):
                seeds = range(batch * len(prompts), (batch + 1) * len(prompts))
                self._plain(
                    prompts,
                    num_inference_steps=self._sampling.steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                )

        return len(prompts) * batches / self._seconds(draw)

    def _chosen(self, several: bool) -> list[LearnedEmbedding]:
        return self._embeddings if several else self._embeddings[:1] * len(self._embeddings)

    def _seconds(self, work: Callable[[], object]) -> float:
        """Time a work. Both sides end with their pictures on the CPU, so no device work is pending."""
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    disable_progress_bar()
    if options.stage:
        title = "Generation: the stage against a plain loop"
        say(heading(title, "benchmarks.generation", arguments, model=options.model))
        say(table(["", "pictures/s", "times the loop"], stage_and_loop(options)))
        return 0
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    sampler = f"{options.solver}, {options.steps} steps, guidance {options.guidance_scale:g}"
    say(heading("Generation", "benchmarks.generation", arguments, model=options.model, device=device, sampler=sampler))
    rows: list[list[object]] = []
    loading = 0.0
    for size in options.batch_sizes:
        sampling = SamplingConfig(
            solver=options.solver, steps=options.steps, guidance_scale=options.guidance_scale, batch_size=size
        )
        drawing = Drawing(options.model, options.device, sampling, options.threads)
        works = {
            (who, what): partial(draw, several, options.batches)
            for what, several in (("one concept", False), ("every row another", True))
            for who, draw in (("plain diffusers", drawing.theirs), ("ours", drawing.ours))
        }
        named = {f"{what}, {who}": work for (who, what), work in works.items()}
        rates = alternate(named, options.repetitions)
        for name, each in rates.items():
            against = rates[name.replace("ours", "plain diffusers")]
            rows.append([size, name, Spread.of(each), Spread.of(each).median / Spread.of(against).median])
        loading = loading or seconds_to_load(drawing, options.model)
    say(table(["batch", "", "pictures/s", "times plain diffusers"], rows) + "\n")
    say(f"plain diffusers, to load one concept more: {1000 * loading:.1f} ms\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = SamplingConfig()
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-sizes", type=parse_numbers, default=[4, 16], metavar="N,N")
    parser.add_argument("--batches", type=int, default=2, help="a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--solver", default=default.solver, choices=("ddim", "dpm++"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument(
        "--stage", type=int, default=0, metavar="ROWS", help="the stage against a loop, in place of all this"
    )
    parser.add_argument("--rows-per-part", type=int, default=32, help="with --stage; ROWS are three parts or more")
    return parser.parse_args(arguments)


def an_embedding(backbone: Backbone, word: str, seed: int) -> LearnedEmbedding:
    """Return an embedding with a random vector of the vocabulary's mean length."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for key, token_table in backbone.token_tables.items():
        row = torch.randn(1, token_table.dim, generator=generator)
        vectors[key] = row * (token_table.mean_norm / row.norm())
    return LearnedEmbedding(placeholder_token=word, vectors=vectors)


def load_into(pipeline: Any, embeddings: list[LearnedEmbedding]) -> None:
    """Load all concepts at once, which is fastest."""
    rows = [next(iter(embedding.vectors.values())) for embedding in embeddings]
    pipeline.load_textual_inversion(rows, token=[embedding.placeholder_token for embedding in embeddings])


def seconds_to_load(drawing: Drawing, model: str) -> float:
    """Return the mean seconds to load a concept, loading one by one as a service does."""
    plain = drawing.pipeline(locate(model))
    began = time.perf_counter()
    for number in range(WORDS_PER_LOAD):
        load_into(plain, [an_embedding(drawing.backbone, f"<more-{number}>", number)])
    return (time.perf_counter() - began) / WORDS_PER_LOAD


# The stage


def stage_and_loop(options: argparse.Namespace) -> list[list[object]]:
    """Return the rows of the table. The loop runs before and after each stage, so that both see the same load."""
    loops = []
    stages = []
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "actors.count=1",
            f"device={options.device}",
            f"generation.rows_per_part={options.rows_per_part}",
            f"generation.sampling.steps={options.steps}",
        ]
        config = load_config("", settings, model=options.model, output=f"{folder}/loop")
        rows = [
            {"row_id": f"{i:05d}", "concept_id": "none", "fingerprint": "", "prompt": PROMPT.format("cat"), "seed": i}
            for i in range(options.stage)
        ]
        drawer = Drawer(config)
        for repetition in range(options.repetitions + 1):
            loops.append(loop_rate(drawer, rows, options.rows_per_part))
            if repetition < options.repetitions:
                stages.append(stage_rate(replace(config, output=f"{folder}/{repetition}"), rows))
    loop = Spread.of(loops)
    stage = Spread.of(stages)
    return [["plain loop", loop, 1.0], ["Ray Data stage", stage, stage.median / loop.median]]


def loop_rate(drawer: Drawer, rows: list[dict[str, Any]], rows_per_part: int) -> float:
    """Return pictures a second, without the first part."""
    parts = [pa.Table.from_pylist(rows[i : i + rows_per_part], PLAN_SCHEMA) for i in range(0, len(rows), rows_per_part)]
    drawer(parts[0])
    began = time.perf_counter()
    for part in parts[1:]:
        drawer(part)
    return (len(rows) - rows_per_part) / (time.perf_counter() - began)


def stage_rate(config: RunConfig, rows: list[dict[str, Any]]) -> float:
    """Return pictures a second, without the first part. Raises ValueError if there are too few parts."""
    import ray

    from pipeline.cluster import new_fleet

    store = RunStore(config.output)
    put_plan(store, PLAN, iter(rows), PLAN_SCHEMA)
    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    fleet = new_fleet(config, 0)
    try:
        draw_plan(config, len(rows), fleet)
    finally:
        fleet.dismiss()
        if started:
            ray.shutdown()
    ends = sorted(part.stat().st_mtime for part in (Path(config.output) / METADATA).glob("*.parquet"))
    if len(ends) < 3:
        raise ValueError(f"{len(rows)} rows made {len(ends)} parts; three are needed to see a rate")
    return (len(rows) - len(rows) / len(ends)) / (ends[-1] - ends[0])


if __name__ == "__main__":
    sys.exit(main())
