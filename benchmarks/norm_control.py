"""Compare forms of norm control: each learns the same concepts, and CLIP scores the pictures drawn.

    python -m benchmarks.norm_control --concepts 8 --learning-rates 0.005 0.02 --settings none clamp sphere clamp:2

A setting is a norm control and its `norm_cap`, 1 where none is given. Prints a markdown table, averaged over concepts:
CLIP-I (identity), CLIP-T (prompt following), the learned rows' norm and the seconds per concept. `--set` takes any of
the job's settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from itertools import islice, product
from statistics import fmean

from PIL import Image

from benchmarks.concepts import read_objects, read_photos
from pipeline.actor.model_loading import load_model
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.models import locate
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.learn import learn

SETTINGS = ("none", "clamp", "clamp:2", "clamp:4", "sphere", "sphere:2")
COLUMNS = ("clip_i", "clip_t", "clip_i_initializer", "clip_t_initializer", "clip_i_photos")

Pair = tuple[Concept, list[Image.Image]]


def main() -> None:
    """Learn with every setting in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="CONTROL[:CAP]")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-3])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    options = parser.parse_args()

    config = load_config("", [*options.set, f"inversion.steps={options.steps}"])
    backbone = load_model(config)
    extractor = ClipExtractor(locate(config.extractor), "cpu")
    concepts = islice(read_objects(options.manifest), options.concepts)
    pairs = [(concept, read_photos(concept)) for concept in concepts]
    say = sys.stdout.write
    say(f"{len(pairs)} concepts, {options.steps} steps of {config.inversion.batch_size}\n\n")
    say(f"| norm control | learning rate | {' | '.join(COLUMNS)} | row norm | s per concept |\n")
    say("|---" * (len(COLUMNS) + 4) + "|\n")
    for setting, rate in product(options.settings, options.learning_rates):
        control, _, cap = setting.partition(":")
        inversion = dataclasses.replace(
            config.inversion, norm_control=control, norm_cap=float(cap or 1), learning_rate=rate
        )
        figures = measure(backbone, extractor, pairs, inversion, config)
        say(f"| {setting} | {rate:g} | {' | '.join(f'{figure:.3f}' for figure in figures)} |\n")
        sys.stdout.flush()


def measure(
    backbone: Backbone, extractor: ClipExtractor, pairs: list[Pair], inversion: InversionConfig, config: RunConfig
) -> list[float]:
    """Return `COLUMNS`, then the mean row norm and the seconds of learning a concept, for one setting."""
    began = time.perf_counter()
    learned = learn(backbone, pairs, inversion, seed=config.seed)
    seconds = (time.perf_counter() - began) / len(pairs)
    scores = [
        score(extractor, photos, draw_samples(backbone, concept, embedding, config.grid, config.seed))
        for (concept, photos), embedding in zip(pairs, learned, strict=True)
    ]
    return [fmean(each[name] for each in scores) for name in COLUMNS] + [fmean(map(mean_norm, learned)), seconds]


def mean_norm(embedding: LearnedEmbedding) -> float:
    """Return the mean L2 norm of the rows."""
    return fmean(rows.norm(dim=1).mean().item() for rows in embedding.vectors.values())


if __name__ == "__main__":
    main()
