"""Learn concepts with the cheaper gradients of `benchmarks.gradient_levers`, and compare their pictures.

    python -m benchmarks.cheaper_learning --concepts 16 --steps 200

Each held-out object of the demo world is learned by the recipe `demo`, one sample a step, as it is and in each cheaper
way; those of half resolution apply to the noisy half of the timesteps alone. Sample grids are drawn from the same noise
and scored as an actor scores them. The table: mean difference of CLIP-I and CLIP-T from learning as it is, paired by
concept, and half a 95 % interval. Prints markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.concepts import read_objects, read_photos
from benchmarks.gradient_levers import (
    SAME_PICTURE,
    SAME_TIMESTEP,
    VARIANTS,
    WHOLE,
    gradients_by,
    halved,
    seen_at_half_size,
)
from benchmarks.intervals import against, over_concepts, signed
from benchmarks.timing import heading, note, say, table
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config
from pipeline.inputs.models import locate
from textual_inversion.config import InversionConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.learning import learn_outcomes
from textual_inversion.noise import Noise


class SmallerWhereNoisy:
    """A noise process whose samples in the noisy half of the timesteps have half the side. For passes of one sample."""

    def __init__(self, noise: Noise, variant: str) -> None:
        self._noise = noise
        self._variant = variant

    def __getattr__(self, name: str) -> Any:
        return getattr(self._noise, name)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy latents and the target, [1, channels, height, width] of the sample's own size."""
        if not self._is_smaller(timesteps):
            return self._noise.corrupt(latents, noise, timesteps)
        return self._noise.corrupt(halved(latents), 2 * halved(noise), self._seen(timesteps))

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        seen = self._seen(timesteps) if self._is_smaller(timesteps) else timesteps
        return self._noise.model_timesteps(seen)

    def _is_smaller(self, timesteps: Tensor) -> bool:
        [timestep] = timesteps.tolist()
        return timestep >= self._noise.num_timesteps // 2

    def _seen(self, timesteps: Tensor) -> Tensor:
        return timesteps if self._variant == SAME_TIMESTEP else seen_at_half_size(self._noise, timesteps)


@contextmanager
def learning_by(backbone: Any, config: InversionConfig, variant: str) -> Iterator[InversionConfig]:
    """Let a backbone learn in a cheaper way within the block, with the settings that it yields."""
    noise = backbone.noise
    if variant in (SAME_TIMESTEP, SAME_PICTURE):
        backbone.noise = SmallerWhereNoisy(noise, variant)
    try:
        with gradients_by(backbone, variant) as path:
            yield replace(config, gradient_path=path)
    finally:
        backbone.noise = noise


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cheaper_learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--concepts", type=int, default=16, help="held-out objects of the demo world")
    parser.add_argument("--steps", type=int, default=200, help="of one sample")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = replace(load_config((RECIPES / "demo.toml").read_text()).inversion, steps=options.steps)
    backbone = load_backbone(locate(RunConfig().model), device="cpu", precision="float32")
    extractor = ClipExtractor(locate(RunConfig().extractor), "cpu")
    rows: list[Mapping[str, Any]] = []
    for concept in islice(read_objects(), options.concepts):
        photos = read_photos(concept)
        for variant in (WHOLE, *options.variants):
            note(f"{concept.concept_id}, {variant}")
            with learning_by(backbone, config, variant) as settings:
                [outcome] = learn_outcomes(
                    backbone, [(concept, photos)], settings, slots=1, seed=0, extractor=extractor
                )
            assert outcome.embedding is not None
            samples = draw_samples(backbone, concept, outcome.embedding, RunConfig().grid, 0)
            scores = score(extractor, photos, samples)
            rows.append({"setup": variant, "concept_id": concept.concept_id, "seed": 0, **scores})
    say(heading("Learning by cheaper gradients", "benchmarks.cheaper_learning", arguments))
    say(comparison(rows))
    return 0


def comparison(rows: list[Mapping[str, Any]]) -> str:
    """Return the table of all ways."""
    scores = ("clip_i", "clip_t")
    means = {each: over_concepts(rows, each) for each in scores}
    less = {each: against(rows, each, WHOLE) for each in scores}
    titles = ["learned by", "CLIP-I", "less the whole's", "CLIP-T", "less the whole's"]
    return table(
        titles,
        [
            [name, *(cell for each in scores for cell in (means[each][name], signed(less[each].get(name))))]
            for name in dict.fromkeys(row["setup"] for row in rows)
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
