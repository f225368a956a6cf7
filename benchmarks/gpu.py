"""Measure how much of an accelerator the engine uses, with random weights of Stable Diffusion 1.5's or XL's shape.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --short
    python -m benchmarks.gpu --shape sdxl --checkpointing --slots 1,2,4
    python -m benchmarks.gpu --modes eager --slots 8 --attention flash,efficient,cudnn,math
    python -m benchmarks.gpu --shape small --device cpu --slots 1,2

For each number of slots, and for the U-Net as it is (`eager`), compiled by torch.compile (`compiled`), and compiled
with its kernels recorded as CUDA graphs (`graphs`): sample-steps a second, model-FLOP utilisation and memory. Each row
is printed as soon as it is measured, so that an interrupted command leaves the rows before. Repetitions alternate with
the common algorithm's (`benchmarks/restatement.py`, the same weights), and the ratio is of these two; that algorithm
trains one text encoder, so that rows of Stable Diffusion XL have no ratio. Compiling takes minutes for each number of
slots and for the sample grid; `--short` compiles for one number only, and is meant for a machine that is available for
ten minutes. With `--attention` follow rows with each of these implementations of attention in place of torch's choice,
which tell whether it chooses well. `benchmarks/gpu_job.py` packs what a machine without this project's packages needs.

Model FLOPs are those of one sample's forward pass and of the backward pass through its activations, counted on the
model; activations computed twice to save memory count once. They are compared with the peak of the device's data sheet
and with the rate of large matrix products, which is measured at the start and which no program exceeds. Memory is the
peak above the memory in use before, warm-up included; beside it are the estimate by which an actor chooses
(`textual_inversion/memory_estimate.py`), which knows nothing of compilation, and the ratio of the two. The last line
says whether the measured memory of the eager rows stays within what an actor allows for the estimate (the exit code is
1 if not); a CPU counts no peak, so that nothing is checked there. With `--checkpointing` all rows use gradient
checkpointing, the common algorithm's, too. Concepts an hour are calculated from encoding a concept's photos, the
default number of samples at this rate, and the pictures that an actor draws of it by default in the same mode, one
after the other: its sample grid, and those of its initializer word, which only the first concept of an actor with that
word needs. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.accelerator import Figures, matrix_tflops, peak_tflops
from benchmarks.gpu_rows import (
    BUDGET_SAMPLES,
    NO_KERNEL,
    OUT_OF_MEMORY,
    TITLES,
    Attempt,
    Drawing,
    Setting,
    Work,
    memory_verdict,
    row_of,
)
from benchmarks.gpu_works import (
    seconds_of_grid,
    seconds_of_initializer,
    seconds_once,
    time_common,
    time_engine,
)
from benchmarks.random_model import SHAPES, Parts, count_flops
from benchmarks.timing import alternate, heading, note, number, parse_numbers, say, table, table_line
from pipeline.actor.memory_plan import LEARNING_SHARE
from textual_inversion.config import InversionConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import learning_memory

MODES = ("eager", "compiled", "graphs")

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

SHORT = {
    "slots": [1, 4, 8, 16],
    "compiled_slots": [8],
    "steps": 10,
    "repetitions": 3,
    "attention": ["flash", "efficient", "cudnn"],
}


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
    setting = Setting(
        encoding_s=seconds_once(eager, options.device),
        tflop=count_flops(options.shape) / 1e12,
        peak=options.peak_tflops or peak_tflops(device),
        matrix_rate=matrix_tflops(options.device, dtype),
    )
    facts = {
        "device": device,
        "model": f"{options.shape}, U-Net of {parts.parameters() / 1e6:,.1f} M, {dtype}, {eager.resolution} px",
        "samples": f"{options.batch_size} a step and concept, {BUDGET_SAMPLES:,} a concept",
        "gradient_checkpointing": "on" if options.checkpointing else "off",
        "repetitions": f"{options.repetitions} of {options.steps} steps",
        "model_GFLOP_a_sample_step": number(1000 * setting.tflop),
        "TFLOP/s": f"{number(setting.peak) if setting.peak else 'unknown'} by the data sheet, "
        f"{number(setting.matrix_rate)} measured in matrix products",
        "a_concept's_photos_encoded": f"{number(setting.encoding_s)} s",
    }
    say(heading("Use of an accelerator", "benchmarks.gpu", arguments, **facts))
    say(table(TITLES, []))
    drawing = Attempt(partial(seconds_of_drawing, eager, options.repetitions))()
    common = common_work(parts, drawing, options)
    failed = False
    ratios = []
    for work, beside in measured(common, works_of(parts, eager, drawing, options), options.repetitions):
        say(table_line(row_of(work, beside, setting)))
        failed = failed or work.attempt.error not in ("", OUT_OF_MEMORY, NO_KERNEL)
        if work.is_eager and work.memory_ratio:
            ratios.append(work.memory_ratio)
    say(f"\n{memory_verdict(ratios)}\n")
    return 1 if failed or max(ratios, default=0) > 1 / LEARNING_SHARE else 0


def seconds_of_drawing(backbone: Backbone, repetitions: int) -> Drawing:
    """Measure what an actor draws of a concept."""
    return Drawing(seconds_of_grid(backbone, repetitions), seconds_of_initializer(backbone, repetitions))


def common_work(parts: Parts, drawing: Drawing | None, options: argparse.Namespace) -> Work | None:
    """Return the common algorithm as a row; None for a model that it cannot train."""
    algorithm = parts.common(options.batch_size)
    side_px = SHAPES[options.shape].vae["sample_size"]
    work = partial(time_common, algorithm, side_px, options.steps, options.batch_size, options.device)
    return algorithm and Work("common algorithm", Attempt(work), drawing)


def works_of(parts: Parts, eager: Backbone, drawing: Drawing | None, options: argparse.Namespace) -> Iterator[Work]:
    """Yield the rows to measure, mode by mode; `drawing`: that of the eager mode.

    Compiled code of a row is freed when the next is requested.
    """
    config = InversionConfig(steps=options.steps, batch_size=options.batch_size)
    if "eager" in options.modes:
        for slots in options.slots:
            note(f"{slots} slots, eager")
            attempt = Attempt(partial(time_engine, eager, config, slots, options.device))
            yield Work(f"{slots} slots, eager", attempt, drawing, estimated_gb(eager, config, slots), is_eager=True)
        for name in options.attention:
            note(f"{slots} slots, {name} attention")
            attempt = Attempt(partial(time_attention, name, partial(time_engine, eager, config, slots, options.device)))
            yield Work(f"{slots} slots, {name} attention", attempt)
    for mode in (mode for mode in options.modes if mode != "eager"):
        backbone = parts.backbone(mode, options.backend)
        note(f"sample pictures, {mode}")
        seconds = Attempt(partial(seconds_of_drawing, backbone, options.repetitions))()
        forget_compiled()
        for slots in options.compiled_slots:
            note(f"{slots} slots, {mode}")
            attempt = Attempt(partial(time_engine, backbone, config, slots, options.device))
            yield Work(f"{slots} slots, {mode}", attempt, seconds, estimated_gb(eager, config, slots))
            forget_compiled()


def time_attention(name: str, time_work: Callable[[], Figures]) -> Figures:
    """Measure a work with one implementation of attention. Raises RuntimeError where the device does not have it."""
    with sdpa_kernel(ATTENTION[name]):
        return time_work()


def estimated_gb(eager: Backbone, config: InversionConfig, slots: int) -> float:
    """Return the estimated peak of the tensors that a learning pass makes."""
    return learning_memory(eager, config, slots).peak / 1e9


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
        "--attention",
        type=names,
        default=[],
        metavar="NAME,NAME",
        help=f"some of {', '.join(ATTENTION)}: rows of the last number of slots, eager (default: none)",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="for ten minutes: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in SHORT.items()),
    )
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing in all rows")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    default = InversionConfig().batch_size
    parser.add_argument("--batch-size", type=int, default=default, help="samples a step and concept")
    parser.add_argument("--steps", type=int, default=20, help="a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of a device that is not in the table")
    slots = parser.get_default("slots")
    if parser.parse_args(arguments).short:
        parser.set_defaults(**SHORT)  # what the command line names wins
    options = parser.parse_args(arguments)
    for option, given, known in (("modes", options.modes, MODES), ("attention", options.attention, ATTENTION)):
        if unknown := set(given) - {*known}:
            parser.error(f"--{option}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.compiled_slots = options.compiled_slots or ([1, 8] if options.slots == slots else options.slots)
    return options


def names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
