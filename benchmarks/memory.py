"""Estimate the memory of learning and drawing with models of real shapes, without their weights and without a GPU.

    python -m benchmarks.memory
    python -m benchmarks.memory --models sd15 --batch-size 2

Networks are made of tensors that have a shape and no data, in bfloat16 beside float32 text encoders, as an actor on a
GPU loads them. Their passes are estimated as an actor does at its start (`textual_inversion/memory_estimate.py`):
weights, what a sample keeps for the backward pass (text encoders included), the peak of a pass of one concept and what
each further concept adds; then a batch of pictures, whole and with the autoencoder on one after the other. A U-Net is
estimated with whole gradients, then with those of the up path alone (`inversion.gradient_path`).
`benchmarks.gpu` compares such an estimate with the peak that a GPU measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import other_shapes
from benchmarks.random_model import SHAPES, Parts
from benchmarks.timing import heading, say, table, table_line
from textual_inversion.config import GradientPath, InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import PassMemory, draw_made_up, learn_made_up, trace

TITLES = [
    "",
    "GB of weights",
    "GB kept of a sample",
    "GB of a pass of one concept",
    "GB of each further one",
    "GB of a batch of pictures",
    "GB of it in slices",
]

MODELS = ("sd15", "sdxl", *other_shapes.NAMES)


def a_model(name: str) -> Backbone:
    """Make one of `MODELS`; within a `FakeTensorMode`, one without data."""
    if name in other_shapes.NAMES:
        return other_shapes.backbone_of(name, torch.bfloat16)
    return Parts(SHAPES[name], "cpu", torch.bfloat16).backbone()


def main(arguments: list[str] | None = None) -> int:
    """Print the table, row by row."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    facts = {
        "a_pass_of_one_concept": f"{options.batch_size} samples",
        "a_batch_of_pictures": f"{options.pictures}, with guidance",
    }
    say(heading("Estimated memory", "benchmarks.memory", arguments, **facts))
    say(table(TITLES, []))
    for name in options.models:
        for row in rows(name, options.batch_size, options.pictures):
            say(table_line(row))
    return 0


def rows(name: str, batch_size: int, pictures: int) -> Iterator[Sequence[object]]:
    """Yield a model's rows: without gradient checkpointing, and with it, for each path that gradients can take."""
    mode = FakeTensorMode()
    with mode:
        backbone = a_model(name)
    paths: tuple[GradientPath, ...] = ("whole", "up_path") if backbone.has_up_path else ("whole",)
    sampling = SamplingConfig(batch_size=pictures)

    def estimate(work: Callable[[], object], **saving: bool) -> PassMemory:
        backbone.save_memory(MemorySaving(**saving))
        return trace(work, mode)

    drawn = [estimate(partial(draw_made_up, backbone, sampling), slices=slices).peak for slices in (False, True)]
    for path, checkpoints in product(paths, (False, True)):
        config = InversionConfig(batch_size=batch_size, gradient_path=path)
        one, two = (
            estimate(partial(learn_made_up, backbone, config, slots), checkpoints_gradients=checkpoints)
            for slots in (1, 2)
        )
        sizes = [one.weights, one.kept / batch_size, one.peak, two.peak - one.peak, *drawn]
        label = f"{name} at {backbone.resolution} px, {'with' if checkpoints else 'without'} checkpointing"
        label += ", up path" if path == "up_path" else ""
        yield [label, *(size / 1e9 for size in sizes)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=4, help="samples a step and concept")
    parser.add_argument("--pictures", type=int, default=16, help="in a batch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
