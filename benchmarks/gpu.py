"""Measure how much of an accelerator the engine uses, with random weights of Stable Diffusion 1.5's or XL's shape.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --short
    python -m benchmarks.gpu --shape sdxl --checkpointing --slots 1,2,4
    python -m benchmarks.gpu --shape small --device cpu --slots 1,2

For each number of slots, and for the U-Net as it is (`eager`), compiled by torch.compile (`compiled`), and compiled
with its kernels recorded as CUDA graphs (`graphs`): sample-steps a second, model-FLOP utilisation and memory. Each row
is printed as soon as it is measured, so that an interrupted command leaves the rows before. Repetitions alternate with
the common algorithm's (`benchmarks/restatement.py`, the same weights), and the ratio is of these two; that algorithm
trains one text encoder, so that rows of Stable Diffusion XL have no ratio. Compiling takes minutes for each number of
slots and for the sample grid; `--short` compiles for one number only, and is meant for a machine that is available for
ten minutes.

Model FLOPs are those of one sample's forward pass and of the backward pass through its activations, counted on the
model; activations computed twice to save memory count once. Memory is the peak above the memory in use before, warm-up
included; beside it are the estimate by which an actor chooses (`textual_inversion/memory_estimate.py`), which knows
nothing of compilation, and the ratio of the two. The last line says whether the measured memory of the eager rows
stays within what an actor allows for the estimate (the exit code is 1 if not); a CPU counts no peak, so that nothing
is checked there. With `--checkpointing` all rows use gradient checkpointing, the common algorithm's, too. Concepts an
hour are calculated from encoding a concept's photos, 475 steps of 2 samples at this rate, and its sample grid drawn in
the same mode, one after the other. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from benchmarks.random_model import SHAPES, Parts, count_flops
from benchmarks.restatement import CommonAlgorithm
from benchmarks.timing import Spread, alternate, heading, number, parse_numbers, say, table, table_line
from pipeline.actor.memory_plan import LEARNING_SHARE
from pipeline.config import GridConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.latents import EncodedViews, encode_views
from textual_inversion.memory_estimate import learning_memory

T = TypeVar("T")

BUDGET_SAMPLES = 475 * 2
"""Samples in the budget of one concept (Voronov et al. 2023: the mean number of steps until DVAR stops, in batches of
2)."""

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Peak of dense bfloat16 on SXM boards, by a part of the device's name."""

PHOTOS = 5

MODES = ("eager", "compiled", "graphs")

TITLES = [
    "",
    "sample-steps/s",
    "times the common algorithm beside it",
    "MFU %",
    "GB above weights",
    "GB estimated",
    "measured / estimated",
    "s a sample grid",
    "concepts/h",
]

SHORT = {"slots": [1, 4, 8, 16], "compiled_slots": [8], "steps": 10, "repetitions": 3}


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of one repetition."""

    rate: float
    """Sample-steps a second."""
    memory_gb: float | None
    """Peak memory above the memory in use before; None on a CPU."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a row failed for another reason than memory."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    parts = Parts(SHAPES[options.shape], options.device, dtype)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    eager = parts.backbone()
    eager.save_memory(MemorySaving(checkpoints_gradients=options.checkpointing))  # of the U-Net that all rows share
    tflop = count_flops(options.shape) / 1e12
    peak = options.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in device), 0.0)
    once = seconds_once(eager, options.device)
    facts = {
        "device": device,
        "model": f"{options.shape}, U-Net of {parts.parameters() / 1e6:,.1f} M, {dtype}, {eager.resolution} px",
        "samples": f"{options.batch_size} a step and concept",
        "gradient_checkpointing": "on" if options.checkpointing else "off",
        "repetitions": f"{options.repetitions} of {options.steps} steps",
        "model_GFLOP_a_sample_step": f"{number(1000 * tflop)}; peak {number(peak) if peak else 'unknown'} TFLOP/s",
        "a_concept's_photos_encoded": f"{number(once)} s",
    }
    say(heading("Use of an accelerator", "benchmarks.gpu", arguments, **facts))
    say(table(TITLES, []))
    common = common_work(parts, options)
    grid = Attempt(partial(seconds_of_grid, eager, options.repetitions))()
    if common:
        common.grid = grid
    failed = False
    ratios = []
    for work, beside in measured(common, works_of(parts, eager, grid, options), options.repetitions):
        say(table_line(row_of(work, beside, once, tflop, peak)))
        failed = failed or work.attempt.error not in ("", OUT_OF_MEMORY)
        if work.is_eager and work.memory_ratio:
            ratios.append(work.memory_ratio)
    say(f"\n{memory_verdict(ratios)}\n")
    return 1 if failed or max(ratios, default=0) > 1 / LEARNING_SHARE else 0


def memory_verdict(ratios: Sequence[float]) -> str:
    """Return a sentence on the estimate of memory. `ratios`: measured over estimated memory of each eager row."""
    if not ratios:
        return "The estimate of memory was not checked: no peak was measured, which takes a GPU."
    holds = max(ratios) <= 1 / LEARNING_SHARE
    return (
        f"Measured memory is {number(min(ratios))} to {number(max(ratios))} times the estimate in {len(ratios)} eager "
        f"rows, which is {'within' if holds else 'MORE THAN'} the {number(1 / LEARNING_SHARE)} times that an actor "
        "leaves free for it."
    )


def common_work(parts: Parts, options: argparse.Namespace) -> Work | None:
    """Return the common algorithm as a row; None for a model that it cannot train."""
    algorithm = parts.common(options.batch_size)
    return algorithm and Work("common algorithm", Attempt(partial(time_common, algorithm, options)))


def works_of(parts: Parts, eager: Backbone, grid: float | None, options: argparse.Namespace) -> Iterator[Work]:
    """Yield the rows to measure, mode by mode; `grid`: seconds of a sample grid in the eager mode.

    Compiled code of a row is freed when the next is requested.
    """
    if "eager" in options.modes:
        for slots in options.slots:
            note(f"{slots} slots, eager")
            attempt = Attempt(partial(time_engine, eager, options, slots))
            yield Work(f"{slots} slots, eager", attempt, grid, estimated_gb(eager, options, slots), is_eager=True)
    for mode in (mode for mode in options.modes if mode != "eager"):
        backbone = parts.backbone(mode, options.backend)
        note(f"a sample grid, {mode}")
        seconds = Attempt(partial(seconds_of_grid, backbone, options.repetitions))()
        forget_compiled()
        for slots in options.compiled_slots:
            note(f"{slots} slots, {mode}")
            attempt = Attempt(partial(time_engine, backbone, options, slots))
            yield Work(f"{slots} slots, {mode}", attempt, seconds, estimated_gb(eager, options, slots))
            forget_compiled()


def estimated_gb(eager: Backbone, options: argparse.Namespace, slots: int) -> float:
    """Return the estimated peak of the tensors that a learning pass makes."""
    return learning_memory(eager, InversionConfig(batch_size=options.batch_size), slots).peak / 1e9


def forget_compiled() -> None:
    """Free compiled code: CUDA graphs keep their memory, and no shape is used twice."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(common: Work | None, works: Iterable[Work], repetitions: int) -> Iterator[tuple[Work, Work | None]]:
    """Yield each row with the common algorithm's figures of the same repetitions, if there is one; first the common
    algorithm itself."""
    is_first = True
    for work in works:
        attempts = {each.name: each.attempt for each in (common, work) if each}
        found = alternate(attempts, repetitions)
        beside = common and common.with_figures(found[common.name])
        if is_first and beside:
            yield beside, beside
        is_first = False
        yield work.with_figures(found[work.name]), beside


def row_of(work: Work, beside: Work | None, once: float, tflop: float, peak: float) -> list[object]:
    """Return a row of the table. `once`: seconds to encode a concept's photos."""
    if not work.rates:
        return [work.name, work.attempt.error, *[None] * (len(TITLES) - 2)]
    rate = Spread.of(work.rates)
    times = rate.median / median(beside.rates) if beside and beside.rates else None
    used = 100 * rate.median * tflop / peak if peak else None
    hourly = None if work.grid is None else 3600 / (once + BUDGET_SAMPLES / rate.median + work.grid)
    memory = (work.memory_gb, work.estimated_gb, work.memory_ratio)
    return [work.name, rate, times, used, *memory, work.grid, hourly]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="sd15", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--slots", type=parse_numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,N")
    parser.add_argument(
        "--compiled-slots",
        type=parse_numbers,
        metavar="N,N",
        help="of the modes that compile (default: 1,8, or --slots where that is given)",
    )
    parser.add_argument(
        "--modes",
        type=names,
        default=list(MODES),
        metavar="NAME,NAME",
        help="some of eager, compiled, graphs (default: all)",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="for ten minutes: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in SHORT.items()),
    )
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing in all rows")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    parser.add_argument("--batch-size", type=int, default=2, help="samples a step and concept")
    parser.add_argument("--steps", type=int, default=20, help="a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of a device that is not in the table")
    slots = parser.get_default("slots")
    if parser.parse_args(arguments).short:
        parser.set_defaults(**SHORT)  # what the command line names wins
    options = parser.parse_args(arguments)
    if unknown := set(options.modes) - {*MODES}:
        parser.error(f"--modes: no mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    options.compiled_slots = options.compiled_slots or ([1, 8] if options.slots == slots else options.slots)
    return options


def names(text: str) -> list[str]:
    return text.split(",")


def note(text: str) -> None:
    """Write progress to standard error, apart from the table."""
    sys.stderr.write(f"{text}\n")


OUT_OF_MEMORY = "out of memory"


class Attempt(Generic[T]):
    """Work that may fail, mostly for lack of memory; a call then returns None, and later calls do not try again."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.error = ""
        self.results: list[T] = []

    def __call__(self) -> T | None:
        if self.error:
            return None
        try:
            self.results.append(self._work())
            return self.results[-1]
        except torch.OutOfMemoryError:
            self.error = OUT_OF_MEMORY
        except RuntimeError as error:  # one mode that cannot be compiled must not take the others' rows with it
            self.error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # after the except clause: the error's stack holds tensors
        return None


@dataclass(slots=True)
class Work:
    """Row of the table to be measured."""

    name: str
    attempt: Attempt[Figures]
    grid: float | None = None
    """Seconds to draw a concept's sample pictures in the same mode."""
    estimated_gb: float | None = None
    """Estimate of `memory_gb` without compilation; None for the common algorithm."""
    is_eager: bool = False
    """Whether the estimate is of the same code: nothing of the row is compiled."""
    rates: list[float] = field(default_factory=list)
    """Sample-steps a second of each repetition; empty if one failed."""

    def with_figures(self, found: Sequence[Figures | None]) -> Work:
        rates = [figures.rate for figures in found if figures]
        return replace(self, rates=[] if self.attempt.error else rates)

    @property
    def memory_gb(self) -> float | None:
        """Peak memory of all repetitions and of the warm-up, in which graphs are recorded; None on a CPU."""
        return max((each.memory_gb for each in self.attempt.results if each.memory_gb), default=None)

    @property
    def memory_ratio(self) -> float | None:
        """Measured memory over estimated memory; None where either is unknown."""
        return self.memory_gb / self.estimated_gb if self.memory_gb and self.estimated_gb else None


def time_common(common: CommonAlgorithm, options: argparse.Namespace) -> Figures:
    common.begin(a_concept(0), photos(SHAPES[options.shape].vae["sample_size"]))
    return timed(lambda: common.learn(options.steps), options.steps * options.batch_size, options.device)


def time_engine(backbone: Backbone, options: argparse.Namespace, slots: int) -> Figures:
    """Measure the engine with all slots full for all steps."""
    config = InversionConfig(steps=options.steps, batch_size=options.batch_size)
    views = encode(backbone)
    waiting = [Assignment(a_concept(number), views) for number in range(slots)]
    engine = Engine(backbone, config, slots=slots, seed=0)

    def end(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")

    def run() -> None:
        engine.run(lambda _wait: waiting.pop() if waiting else None, end)

    return timed(run, options.steps * options.batch_size * slots, options.device)


def timed(work: Callable[[], object], samples: int, device: str) -> Figures:
    """Time a work from an idle device to an idle device."""
    if device == "cpu":
        began = time.perf_counter()
        work()
        return Figures(samples / (time.perf_counter() - began), None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return Figures(samples / seconds, (torch.cuda.max_memory_allocated() - before) / 1e9)


def a_concept(number: int) -> Concept:
    return Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=("x",), initializer="cat")


def photos(side: int) -> list[Image.Image]:
    """Return photos of random noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTOS, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def encode(backbone: Backbone) -> EncodedViews:
    """Encode a concept's photos."""
    return encode_views(backbone, photos(backbone.resolution), InversionConfig().augment, "any", 0)


def seconds_once(backbone: Backbone, device: str) -> float:
    """Return the median seconds to encode a concept's photos."""
    return median(PHOTOS / timed(lambda: encode(backbone), PHOTOS, device).rate for _ in range(3))


def seconds_of_grid(backbone: Backbone, repetitions: int) -> float:
    """Return the seconds of a concept's share of a batch of sample pictures, which the grids of several concepts fill,
    as in an actor. The initializer word's pictures are left out: they are drawn only where scores are computed."""
    grid = GridConfig()
    sampling = SamplingConfig()
    rows = {key: torch.zeros(1, table.dim) for key, table in backbone.token_tables.items()}
    embedding = LearnedEmbedding(placeholder_token="<c0>", vectors=rows)
    requests = [ImageRequest("a photo of a <c0>", seed, (embedding,)) for seed in range(sampling.batch_size)]
    seconds = []
    for _ in range(repetitions + 1):  # the first is not counted
        began = time.perf_counter()
        generate(backbone, requests, sampling)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:]) * len(grid.prompts) * grid.images_per_prompt / len(requests)


if __name__ == "__main__":
    sys.exit(main())
