"""Measure which start is nearest to the end of learning: every method of `init.method` on the demo's concepts.

    python -m benchmarks.starts --concepts 8 --steps 40

Prints a markdown table. The loss is the denoising loss on a fixed batch of each concept (augmented photos, noise,
prompts and timesteps spread over the schedule, the same for all methods), averaged over concepts. "steps to ..." is the
number of steps until the loss that the first method reaches after a quarter, and after half of its steps. CLIP-I is of
pictures drawn from the same noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from benchmarks.concepts import read_objects, read_photos
from pipeline.actor.model_loading import load_model
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.models import locate
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig, InversionConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.latents import EncodedViews, encode_views, sample_latents
from textual_inversion.metrics import clip_i
from textual_inversion.objective import denoising
from textual_inversion.prompts import encode_prompt, placeholder_rows, training_templates
from textual_inversion.rng import generator_for, seed_for
from textual_inversion.start_choice import ChosenStart, StartChooser

FROZEN_SAMPLES = 48
PICTURES = 4

METHODS = {
    "words": InitConfig(),
    "encoder_output": InitConfig(method="encoder_output"),
    "auto": InitConfig(method="auto"),
    "amortised": InitConfig(method="amortised"),
    "words, none given": InitConfig(),
    "amortised, none given": InitConfig(method="amortised"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Concept with everything that does not depend on the method."""

    concept: Concept
    photos: list[Image.Image]
    views: EncodedViews
    loss: Callable[[dict[str, Tensor]], float]
    """Function from the concept's rows to their loss on the fixed batch."""


@dataclass(slots=True)
class Figures:
    """Measurements of one method, averaged over concepts."""

    losses: dict[int, float]
    """Loss by number of steps."""
    clip_i: dict[int, float]
    seconds: float
    """Seconds to choose all starts, including work done once an actor."""
    reasons: list[str]


def main() -> None:
    """Learn with every method in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--every", type=int, default=5, metavar="STEPS", help="steps between two measurements of the loss"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    options = parser.parse_args()

    config = load_config("", [*options.set, f"inversion.steps={options.steps}"])
    backbone = load_model(config)
    extractor = ClipExtractor(locate(config.extractor), "cpu")
    cases = list(islice(read_cases(backbone, options.manifest, config), options.concepts))
    say = sys.stdout.write
    steps = range(0, options.steps + 1, options.every)
    say(f"{len(cases)} concepts, {options.steps} steps of {config.inversion.batch_size}\n\n")
    goals = (steps[len(steps) // 4], steps[len(steps) // 2])
    titles = [
        "start",
        *(f"loss at {step}" for step in steps),
        *(f"steps to the first loss at {goal}" for goal in goals),
    ]
    titles += ["CLIP-I at 0", f"CLIP-I at {steps[-1]}", "s to choose"]
    say(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n")
    first: dict[int, float] = {}
    for name in options.methods:
        init = dataclasses.replace(METHODS[name], words=config.inversion.init.words)
        norm_control = "none" if init.method == "encoder_output" else config.inversion.norm_control
        inversion = dataclasses.replace(config.inversion, init=init, norm_control=norm_control)
        chosen = [drop_word(case) for case in cases] if name.endswith("none given") else cases
        figures = measure(backbone, extractor, chosen, inversion, options.every, config.seed)
        first = first or figures.losses
        cells = [name, *(f"{figures.losses[step]:.4f}" for step in steps)]
        cells += [steps_to_reach(figures.losses, first[goal]) for goal in goals]
        cells += [f"{figures.clip_i[step]:.3f}" for step in (0, steps[-1])] + [f"{figures.seconds:.1f}"]
        say("| " + " | ".join(cells) + " |\n")
        sys.stdout.flush()
        sys.stderr.write(
            "".join(
                f"{case.concept.concept_id}: {reason}\n" for case, reason in zip(chosen, figures.reasons, strict=True)
            )
        )


def read_cases(backbone: Backbone, manifest: str, config: RunConfig) -> Iterator[Case]:
    """Yield the manifest's objects with their encoded photos. Raises ValueError for a bad row."""
    for concept in read_objects(manifest):
        photos = read_photos(concept)
        views = encode_views(backbone, photos, config.inversion.augment, concept.concept_id, config.seed)
        yield Case(concept, photos, views, fixed_batch_loss(backbone, concept, views))


def drop_word(case: Case) -> Case:
    return dataclasses.replace(case, concept=dataclasses.replace(case.concept, initializer=""))


def fixed_batch_loss(backbone: Backbone, concept: Concept, views: EncodedViews) -> Callable[[dict[str, Tensor]], float]:
    """Return the mean denoising loss on fixed samples, as a function of the rows."""
    generator = generator_for(0, concept.concept_id, "benchmark")
    size = FROZEN_SAMPLES
    view = torch.randint(len(views), (size,), generator=generator)
    eps, noise = torch.randn(2, size, *backbone.latent_shape, generator=generator)
    within = torch.rand(size, generator=generator)
    timesteps = ((torch.arange(size) + within) / size * backbone.noise.num_timesteps).long()
    templates = training_templates(concept, class_cue=False)
    rows_of = placeholder_rows(concept)
    vocabularies = backbone.vocabularies
    ids = stack_prompts([encode_prompt(templates[i % len(templates)], rows_of, vocabularies) for i in range(size)])
    latents = sample_latents(views.moments[view], eps)
    x_t, target = backbone.noise.corrupt(latents, noise, timesteps)
    told = backbone.noise.model_timesteps(timesteps)

    def loss(rows: dict[str, Tensor]) -> float:
        with torch.no_grad():
            prediction = backbone.predict(x_t, told, backbone.encode_prompts(ids, rows))
        return float(denoising(prediction, target).mean())

    return loss


def measure(
    backbone: Backbone,
    extractor: ClipExtractor,
    cases: Sequence[Case],
    inversion: InversionConfig,
    every: int,
    seed: int,
) -> Figures:
    """Choose a start for every concept, learn it and measure the losses."""
    began = time.perf_counter()
    choose = StartChooser(backbone, inversion.init, extractor, seed=seed)
    starts = [choose(case.concept, case.photos) for case in cases]
    seconds = time.perf_counter() - began
    learned = [learn(backbone, case, start, inversion, every, seed) for case, start in zip(cases, starts, strict=True)]
    losses = {
        step: fmean(case.loss(rows[step]) for case, rows in zip(cases, learned, strict=True)) for step in learned[0]
    }
    clip_is = {
        step: fmean(
            clip_i_of_rows(backbone, extractor, case, rows[step]) for case, rows in zip(cases, learned, strict=True)
        )
        for step in (0, max(losses))
    }
    return Figures(losses, clip_is, seconds, [start.reason for start in starts])


def learn(
    backbone: Backbone, case: Case, start: ChosenStart, inversion: InversionConfig, every: int, seed: int
) -> dict[int, dict[str, Tensor]]:
    """Return step -> the concept's rows, before the first step and after every `every` steps."""
    rows: dict[int, dict[str, Tensor]] = {}

    def keep(_concept: Concept, state: SlotState) -> None:
        rows.setdefault(0, dict(state.start))
        rows[state.step] = {key: state.parameters[key] for key in state.start}

    def end(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")
        rows[outcome.steps] = dict(outcome.embedding.vectors)

    waiting = [Assignment(start.concept, case.views, start=start.embedding)]
    engine = Engine(backbone, inversion, slots=1, seed=seed)
    engine.run(lambda _wait: waiting.pop() if waiting else None, end, keep, every)
    return rows


def clip_i_of_rows(backbone: Backbone, extractor: ClipExtractor, case: Case, rows: dict[str, Tensor]) -> float:
    """Return CLIP-I of some pictures of the concept drawn with these rows."""
    embedding = LearnedEmbedding(placeholder_token=case.concept.placeholder_token, vectors=rows)
    prompt = f"a photo of a {case.concept.placeholder_token}"
    seeds = [seed_for(0, case.concept.concept_id, "benchmark", i) for i in range(PICTURES)]
    requests = [ImageRequest(prompt, each, (embedding,)) for each in seeds]
    pictures = generate(backbone, requests, SamplingConfig(steps=12, batch_size=PICTURES))
    return clip_i(extractor.images(pictures), extractor.images(case.photos))


def steps_to_reach(losses: dict[int, float], goal: float) -> str:
    """Return the number of steps after which the loss first reaches the goal, interpolated between measurements."""
    before = 0
    above = losses[0]
    for step, loss in losses.items():
        if loss <= goal:
            return f"{step - (goal - loss) / (above - loss) * (step - before):.1f}" if step else "0"
        before = step
        above = loss
    return f"not in {before}"


if __name__ == "__main__":
    main()
