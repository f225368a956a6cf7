"""Compare cheaper gradients of a concept's rows with the whole one, by noise level.

    python -m benchmarks.gradient_levers --concepts 8 --samples 32

Two ways to spend less on a sample:

- half resolution: the latents' means over squares of two by two, with the means of the same noise, given its deviation
  again. That is a quarter of the pixels. `same timestep` keeps the timestep of the whole picture; `same picture` takes
  the one at which a picture has as much noise as the means of the whole noisy picture have.
- a shorter backward pass: no gradient in the U-Net's down path (`mid and up path`), nor in its middle (`up path`).

For each tenth of the timesteps, the cosine between the gradient of the mean loss with each and that of the whole loss
over the same samples, mean over concepts and half a 95 % interval; `another draw` is the cosine between two whole
gradients over different samples, which is what chance leaves alike. Rows are those of the concept's word and those that
the recipe `demo` learns by whole gradients. `of the FLOPs`: a sample-step's FLOPs in Stable Diffusion 1.5's shape over
those of the whole. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.concepts import read_objects, read_photos
from benchmarks.intervals import signed
from benchmarks.random_model import SHAPES, Parts
from benchmarks.timing import heading, number, say, table
from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config
from pipeline.inputs.models import locate
from pipeline.report.intervals import Interval
from textual_inversion.config import GradientPath, InversionConfig
from textual_inversion.families import load_backbone
from textual_inversion.initialise import class_vectors
from textual_inversion.latents import encode_views
from textual_inversion.learning import learn_outcomes
from textual_inversion.noise import Noise
from textual_inversion.objective import denoising
from textual_inversion.prompts import HOLE, encode_prompt

BINS = 10

WHOLE = "whole"
ANOTHER_DRAW = "another draw"
SAME_TIMESTEP = "half resolution, same timestep"
SAME_PICTURE = "half resolution, same picture"
MID_AND_UP = "mid and up path"
UP = "up path"
VARIANTS = (SAME_TIMESTEP, SAME_PICTURE, MID_AND_UP, UP)

Rows = Mapping[str, Tensor]
"""Text encoder key -> a concept's row [dim]."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of one tenth of the timesteps."""

    latents: Tensor
    """[samples, *latent_shape], without noise."""
    noise: Tensor
    timesteps: Tensor
    """[samples]."""


def gradient(backbone: Any, rows: Rows, samples: Samples, variant: str = WHOLE) -> Tensor:
    """Return the gradient of the mean denoising loss of "a photo of a" with these rows, with respect to them, [dim] of
    all text encoders one after the other."""
    latents, noise, timesteps = samples.latents, samples.noise, samples.timesteps
    if variant in (SAME_TIMESTEP, SAME_PICTURE):
        latents, noise = halved(latents), 2 * halved(noise)
        timesteps = timesteps if variant == SAME_TIMESTEP else seen_at_half_size(backbone.noise, timesteps)
    noisy, target = backbone.noise.corrupt(latents, noise, timesteps)
    prompt = encode_prompt("a photo of a {}", {HOLE: [0]}, backbone.vocabularies)
    ids = {key: torch.tensor([prompt[key]] * len(latents), device=backbone.device) for key in prompt}
    leaves = {key: row[None].clone().requires_grad_() for key, row in rows.items()}
    with gradients_by(backbone, variant) as path:
        conditioning = replace(backbone.encode_prompts(ids, leaves), gradient_path=path)
        prediction = backbone.predict(noisy, backbone.noise.model_timesteps(timesteps), conditioning)
        found = torch.autograd.grad(denoising(prediction, target).mean(), list(leaves.values()))
    return torch.cat([each.flatten() for each in found])


def halved(tensor: Tensor) -> Tensor:
    """Return the means over squares of two by two, [..., height / 2, width / 2]."""
    return F.avg_pool2d(tensor, 2)


def seen_at_half_size(noise: Noise, timesteps: Tensor) -> Tensor:
    """Return the timesteps [batch] with the signal-to-noise ratio that the means over squares of two by two have: four
    times that of the picture; the first timestep where none has as much."""
    every = torch.arange(noise.num_timesteps, device=timesteps.device)
    ones = torch.ones(len(every), 1, device=timesteps.device)
    signal, _ = noise.corrupt(ones, torch.zeros_like(ones), every)
    deviation, _ = noise.corrupt(torch.zeros_like(ones), ones, every)
    ratio = (signal / deviation).square().flatten()  # falls from the first timestep to the last
    return (ratio[None] > 4 * ratio[timesteps][:, None]).sum(1)


@contextmanager
def gradients_by(backbone: Any, variant: str) -> Iterator[GradientPath]:
    """Yield the engine's name of the path that a variant's gradients take. `MID_AND_UP` has none: its down path is run
    without keeping anything for a backward pass within the block."""
    with ExitStack() as stack:
        for module in backbone._network.down_blocks if variant == MID_AND_UP else ():
            module.forward = torch.no_grad()(module.forward)  # hides the class's own
            stack.callback(delattr, module, "forward")
        yield "up_path" if variant == UP else "whole"


def draw_samples(backbone: Any, latents: Tensor, number: int, tenth: int, generator: torch.Generator) -> Samples:
    """Draw samples of a concept's photos [photos, *latent_shape] with timesteps of one tenth."""
    width = backbone.noise.num_timesteps // BINS
    shape = (number, *latents.shape[1:])
    return Samples(
        latents=latents[torch.arange(number) % len(latents)],
        noise=torch.randn(shape, generator=generator),
        timesteps=torch.randint(tenth * width, (tenth + 1) * width, (number,), generator=generator),
    )


def gradients_of(backbone: Any, rows: Rows, latents: Tensor, samples: int, seed: int) -> dict[str, list[Tensor]]:
    """Return the gradient of each tenth of the timesteps, by variant."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in (WHOLE, ANOTHER_DRAW, *VARIANTS)}
    for tenth in range(BINS):
        drawn, others = (draw_samples(backbone, latents, samples, tenth, generator) for _ in range(2))
        for variant in (WHOLE, *VARIANTS):
            found[variant].append(gradient(backbone, rows, drawn, variant))
        found[ANOTHER_DRAW].append(gradient(backbone, rows, others))
    return found


def cosines(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float]]:
    """Return, by variant, the cosine with the whole gradient in each tenth, then of the sum over all timesteps, then of
    that sum with the variant in the noisy half alone."""
    whole = gradients[WHOLE]
    found = {}
    for name, cheap in gradients.items():
        if name != WHOLE:
            noisy_half = [*whole[: BINS // 2], *cheap[BINS // 2 :]]
            pairs = [*zip(cheap, whole, strict=True), (sum(cheap), sum(whole)), (sum(noisy_half), sum(whole))]
            found[name] = [float(F.cosine_similarity(one, other, dim=0)) for one, other in pairs]
    return found


def flops_of(variant: str) -> float:
    """Return the FLOPs of a sample-step in Stable Diffusion 1.5's shape; nothing is computed."""
    backbone = Parts(SHAPES["sd15"], "meta", torch.float32).backbone()
    rows = {key: torch.zeros(table.dim, device="meta") for key, table in backbone.token_tables.items()}
    latents = torch.randn(1, *backbone.latent_shape, device="meta")
    if variant in (SAME_TIMESTEP, SAME_PICTURE):
        latents, variant = halved(latents), WHOLE
    samples = Samples(latents, torch.zeros_like(latents), torch.tensor([500], device="meta"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gradient(backbone, rows, samples, variant)
    return float(counter.get_total_flops())


def table_of(found: Sequence[Mapping[str, Sequence[float]]], num_timesteps: int) -> str:
    """Return a table of the cosines of several concepts."""
    names = list(found[0])
    width = num_timesteps // BINS
    tenths = [f"{i * width} to {(i + 1) * width - 1}" for i in range(BINS)]
    titles = [*tenths, "all", f"all, whole below {num_timesteps // 2}"]
    rows = []
    for place, title in enumerate(titles):
        intervals = [Interval.of(each[name][place] for each in found) for name in names]
        rows.append([title, *(signed(interval) for interval in intervals)])
    return table(["timesteps", *names], rows)


def learning_settings() -> InversionConfig:
    """Return the settings by which rows are learned: those of the recipe `demo`, with whole gradients whatever it has,
    so that the rows do not depend on what is compared at them."""
    return replace(load_config((RECIPES / "demo.toml").read_text()).inversion, gradient_path="whole")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_levers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--concepts", type=int, default=8, help="held-out objects of the demo world")
    parser.add_argument("--samples", type=int, default=32, help="of each tenth of the timesteps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = learning_settings()
    backbone = load_backbone(locate(RunConfig().model), device="cpu", precision="float32")
    say(heading("Cheaper gradients", "benchmarks.gradient_levers", arguments))
    whole = flops_of(WHOLE)
    say(table(["", "of the FLOPs"], [[name, number(flops_of(name) / whole)] for name in VARIANTS]))
    found: dict[str, list[Mapping[str, Sequence[float]]]] = {"the rows of a word": [], "learned rows": []}
    for concept in islice(read_objects(), options.concepts):
        photos = read_photos(concept)
        latents = encode_views(backbone, photos, config.augment, concept.concept_id, 0).moments[:, 0]
        [outcome] = learn_outcomes(backbone, [(concept, photos)], config, slots=1, seed=0, extractor=None)
        assert outcome.embedding is not None
        learned = {key: rows[0] for key, rows in outcome.embedding.vectors.items()}
        for point, rows in zip(found, (class_vectors(concept, backbone), learned), strict=True):
            found[point].append(cosines(gradients_of(backbone, rows, latents, options.samples, seed=0)))
    for point, of_concepts in found.items():
        say(f"\nAt {point}:\n\n{table_of(of_concepts, backbone.noise.num_timesteps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
