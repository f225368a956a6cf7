"""Ask whether sample grids of fewer denoising steps tell the same of a concept as those of 20.

    python -m benchmarks.few_step_grids --concepts 16 --budgets 200 25 --steps 4 6 8 12

Each held-out object of the demo world is learned by the recipe `demo` with each number of steps; one that is too low
gives concepts that fail. Of each, the sample grid is drawn with 20 denoising steps, with each smaller number, and with
20 steps from other noise, which is what chance changes, and scored as an actor scores it. The table: seconds to draw a
concept's grid and its word's, mean difference of CLIP-I and CLIP-T from the 20 steps with half a 95 % interval,
correlation of CLIP-I over concepts, and concepts on which two gates, the default's and the recipe's, say the same.
Prints markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import StatisticsError, correlation, median

import torch
from PIL import Image

from benchmarks.concepts import read_objects, read_photos
from benchmarks.intervals import signed
from benchmarks.timing import heading, say, table
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config
from pipeline.inputs.models import locate
from pipeline.ledger.gate import verdict
from pipeline.report.intervals import Interval
from pipeline.sample_config import GateConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.learning import learn_outcomes

REFERENCE = "20"
OTHER_NOISE = "20, other noise"

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Grid:
    """A concept's sample grid and its initializer word's, drawn in one way."""

    scores: Scores
    seconds: float


def draw(
    backbone: Backbone,
    extractor: ClipExtractor,
    concept: Concept,
    photos: Sequence[Image.Image],
    embedding: LearnedEmbedding,
    ways: Mapping[str, tuple[int, int]],
) -> dict[str, Grid]:
    """Draw and score the grid in each way: name -> (denoising steps, seed of the noise)."""
    grid = RunConfig().grid
    found = {}
    for name, (steps, seed) in ways.items():
        config = replace(grid, sampling=replace(grid.sampling, steps=steps))
        began = time.perf_counter()
        samples = draw_samples(backbone, concept, embedding, config, seed)
        found[name] = Grid(score(extractor, photos, samples), time.perf_counter() - began)
    return found


def row_of(name: str, drawn: Sequence[Mapping[str, Grid]], gates: Mapping[str, GateConfig]) -> list[object]:
    """Return the row of one way."""
    pairs = [(each[name], each[REFERENCE]) for each in drawn]
    differences = [
        Interval.of(ours.scores[score] - theirs.scores[score] for ours, theirs in pairs)
        for score in ("clip_i", "clip_t")
    ]
    return [
        name,
        median(ours.seconds for ours, _ in pairs),
        *(signed(difference) for difference in differences),
        alike([ours.scores["clip_i"] for ours, _ in pairs], [theirs.scores["clip_i"] for _, theirs in pairs]),
        *(agreement([(ours.scores, theirs.scores) for ours, theirs in pairs], gate) for gate in gates.values()),
    ]


def alike(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the correlation of two scores over concepts; None where one does not vary."""
    try:
        return correlation(ours, theirs)
    except StatisticsError:
        return None


def agreement(pairs: Sequence[tuple[Scores, Scores]], gate: GateConfig) -> str:
    """Say on how many concepts two verdicts are the same, and how many pass by the second."""
    verdicts = [(verdict(ours, gate), verdict(theirs, gate)) for ours, theirs in pairs]
    same = sum(ours == theirs for ours, theirs in verdicts)
    passed = sum(theirs == "passed" for _, theirs in verdicts)
    return f"{same} of {len(verdicts)} ({passed} pass by {REFERENCE} steps)"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_step_grids",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--concepts", type=int, default=16, help="held-out objects of the demo world")
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 25], help="steps of learning")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 12], help="denoising steps of the grids")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = load_config((RECIPES / "demo.toml").read_text())
    backbone = load_backbone(locate(RunConfig().model), device="cpu", precision="float32")
    extractor = ClipExtractor(locate(RunConfig().extractor), "cpu")
    ways = {str(steps): (steps, 0) for steps in (*options.steps, int(REFERENCE))} | {OTHER_NOISE: (int(REFERENCE), 1)}
    concepts = [(concept, read_photos(concept)) for concept in islice(read_objects(), options.concepts)]
    drawn = []
    for budget in options.budgets:
        config = replace(recipe.inversion, steps=budget)
        outcomes = learn_outcomes(backbone, concepts, config, slots=8, seed=0, extractor=extractor)
        for (concept, photos), outcome in zip(concepts, outcomes, strict=True):
            assert outcome.embedding is not None
            drawn.append(draw(backbone, extractor, concept, photos, outcome.embedding, ways))
    gates = {"the default gate": RunConfig().gate, "the recipe's gate": recipe.gate}
    titles = ["denoising steps", "s", "CLIP-I", "CLIP-T", "correlation of CLIP-I", *gates]
    say(heading("Sample grids of few steps", "benchmarks.few_step_grids", arguments))
    say(table(titles, [row_of(name, drawn, gates) for name in ways]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
