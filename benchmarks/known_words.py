"""Invert words that the model knows, and measure how far each learned word stays from the word itself.

    python -m benchmarks.known_words --seeds 0 1 2                # rendered photos, 24 words, two setups
    python -m benchmarks.known_words --photos drawn --words cat:dog --seeds 0 1 2

For a known word a perfect embedding exists, the word's own row. Its distance to the learned one needs no feature
extractor: both are drawn from the same noise and compared with the same photos by PSNR and edge strength
(`textual_inversion/fidelity.py`), with CLIP-I beside them. Each word is learned from five photos and from another
word's row, with mirror images and without.
`rendered` photos are drawn like those of the demo's concepts (`demo/make_manifests.py`), which fetches the art once;
`drawn` ones are the model's own pictures of the word, for any model and without a network.

Prints Markdown tables with 95 % intervals over words, seeds averaged within a word (`benchmarks/intervals.py`). All
rows (`rows.json`, kept up to date after every word) and a sheet of pictures for each word go to the output. Time: about
20 s of one core of the demo model for each word, setup and seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from benchmarks.intervals import Row, against, score_by_concept, show_paired, signed
from benchmarks.methods import split
from benchmarks.timing import say, table, table_line
from demo.art import load_atlas
from demo.make_manifests import HERE, concept_scenes
from demo.objects import TRAINING
from demo.world import draw
from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import to_png
from pipeline.bulk.protocols import PROTOCOLS
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.models import locate
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.fidelity import pixel_scores, to_arrays
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.grids import grid
from textual_inversion.learning import learn_outcomes
from textual_inversion.metrics import clip_i
from textual_inversion.prompts import name_in_prompt
from textual_inversion.rng import seed_for

# fmt: skip below: a list of words reads better in a block than on a line each
WORDS = (
    "cat:dog", "apple:lemon", "bus:truck", "car:jeep", "horse:cow", "fish:whale", "hammer:key", "rose:sunflower",
    "lion:cat", "owl:bird", "penguin:bird", "turtle:frog", "crab:octopus", "shark:fish", "banana:lemon",
    "carrot:corn", "strawberry:cherries", "hamburger:bread", "airplane:helicopter", "house:castle", "guitar:drum",
    "clock:bell", "umbrella:balloon", "chair:key",
)  # fmt: skip
"""Words to invert, each with the word that it starts from."""
ITSELF = "the word itself"
SETUPS = {"mirrored": True, "not mirrored": False}
"""Setup -> `inversion.augment.flip`."""
SCORES = {
    "psnr_db": "PSNR, dB",
    "edge_strength": "edges, levels per px",
    "edge_ratio": "edges, of the photo's",
    "clip_i": "CLIP-I",
}
"""Title of each score."""
PROMPT = "a photo of a {}"
NUM_PHOTOS = 5


@dataclass(frozen=True, slots=True)
class KnownWord:
    """Word to invert, as a concept with photos."""

    word: str
    concept: Concept
    photos: list[Image.Image]


@dataclass(frozen=True, slots=True)
class Models:
    """The models, and the settings that all pictures are drawn with."""

    backbone: Backbone
    extractor: ClipExtractor
    sampling: SamplingConfig
    samples: int
    """Pictures of each word and setup."""

    def pictures(self, word: str, text: str, embedding: LearnedEmbedding | None, purpose: str) -> list[Image.Image]:
        """Draw the prompt with `text` in its hole; the noise depends on `word` and `purpose` alone."""
        count = NUM_PHOTOS if purpose == "photos" else self.samples
        embeddings = (embedding,) if embedding else ()
        seeds = [seed_for(0, word, f"known words, {purpose}", i) for i in range(count)]
        requests = [ImageRequest(PROMPT.format(text), seed, embeddings) for seed in seeds]
        return generate(self.backbone, requests, self.sampling)

    def scores(self, pictures: list[Image.Image], photos: list[Image.Image]) -> dict[str, float]:
        """Return the mean of each score in `SCORES` over the pictures."""
        size = (self.backbone.resolution, self.backbone.resolution)
        found = pixel_scores(to_arrays(pictures, size), to_arrays(photos, size))
        means = {name: float(values.mean()) for name, values in found.items()}
        return means | {"clip_i": clip_i(self.extractor.images(pictures), self.extractor.images(photos))}


def main(arguments: list[str] | None = None) -> int:
    """Measure all words in all setups, and print the tables."""
    options = parse(arguments)
    seeds = [int(seed) for seed in split(options.seeds)]
    torch.set_num_threads(options.threads)
    config = load_config("", ["device=cpu", *options.set])
    models = Models(
        backbone=load_model(config),
        extractor=ClipExtractor(locate(config.extractor), config.device),
        sampling=replace(PROTOCOLS["quick"].sampling, batch_size=config.generation.sampling.batch_size),
        samples=options.samples,
    )
    words = [known_word(models, *each.split(":"), options) for each in options.words]
    rows = []
    store = RunStore(absolute(options.output))
    shown: dict[str, list[tuple[str, list[Image.Image]]]] = {known.word: [] for known in words}
    for row, pictures in measure(models, words, config, seeds):
        rows.append(row)
        store.put("rows.json", json.dumps(rows, indent=1).encode())
        sys.stderr.write(f"{row['concept_id']}, {row['setup']}, seed {row['seed']}: {row['psnr_db']:.2f} dB\n")
        shown[row["concept_id"]].append((f"{row['setup']}, seed {row['seed']}", pictures))
    for known in words:
        store.put(f"{known.word}.png", to_png(grid(known.photos, shown[known.word])))
    inversion = config.inversion
    say(f"{len(words)} words, {options.photos} photos, {inversion.steps} steps of {inversion.batch_size}, ")
    say(f"{len(seeds)} seeds, {options.samples} pictures of each\n\n{by_word(rows)}\n{summary(rows)}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--words", nargs="+", default=WORDS, metavar="WORD:INITIALIZER")
    parser.add_argument("--photos", default="rendered", choices=("rendered", "drawn"))
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="N")
    parser.add_argument("--samples", type=int, default=8, help="pictures of each word and setup")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="folder of the demo's art")
    parser.add_argument("--output", default="output/known_words")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for both setups")
    return parser.parse_args(arguments)


def known_word(models: Models, word: str, initializer: str, options: argparse.Namespace) -> KnownWord:
    """Return the word with its photos. Raises ValueError for a word that the world has no object for."""
    photos = (
        models.pictures(word, word, None, "photos") if options.photos == "drawn" else render_photos(word, options.work)
    )
    concept = Concept(
        concept_id=word,
        placeholder_token=f"<known-{word.replace(' ', '-')}>",
        images=tuple(f"{i}" for i in range(len(photos))),
        initializer=initializer,
    )
    return KnownWord(word, concept, photos)


def render_photos(word: str, work: Path) -> list[Image.Image]:
    """Draw the photos of a taught object like those of the demo's concepts; `work` holds the art."""
    things = [thing for thing in TRAINING if thing.name == word]
    if not things:
        raise ValueError(f"{word!r} is no taught object of the demo world (demo/objects.py); --photos drawn needs none")
    atlas = load_atlas(work)
    seed = crc32(word.encode())
    scenes = concept_scenes(things[0])
    return [draw(scene, atlas, np.random.default_rng((7, i, seed))) for i, scene in enumerate(scenes)]


def measure(
    models: Models, words: Sequence[KnownWord], config: RunConfig, seeds: Sequence[int]
) -> Iterator[tuple[dict[str, Any], list[Image.Image]]]:
    """Yield a row with the scores of each word in each setup and seed, and its pictures; the word itself first."""
    for known in words:
        pictures = models.pictures(known.word, known.word, None, "pictures")
        yield row_of(ITSELF, known, seeds[0], models.scores(pictures, known.photos)), pictures
    cases = [(known.concept, known.photos) for known in words]
    for name, flip in SETUPS.items():
        augment = replace(config.inversion.augment, flip=flip)
        inversion = replace(config.inversion, augment=augment)
        for seed in seeds:
            outcomes = learn_outcomes(
                models.backbone, cases, inversion, slots=len(cases), seed=seed, extractor=models.extractor
            )
            for known, outcome in zip(words, outcomes, strict=True):
                assert outcome.embedding is not None
                text = name_in_prompt(known.concept.placeholder_token, outcome.embedding.class_noun)
                pictures = models.pictures(known.word, text, outcome.embedding, "pictures")
                yield row_of(name, known, seed, models.scores(pictures, known.photos)), pictures


def row_of(setup: str, known: KnownWord, seed: int, scores: Mapping[str, float]) -> dict[str, Any]:
    return {"setup": setup, "concept_id": known.word, "seed": seed, **scores}


def by_word(rows: Sequence[Row]) -> str:
    """Return a Markdown table with the scores of each word in each setup, averaged over seeds."""
    means = {score: score_by_concept(rows, score) for score in SCORES}
    keys = sorted(means["psnr_db"], key=lambda key: key[1])
    lines = [[word, setup, *(f"{means[score][setup, word]:.3f}" for score in SCORES)] for setup, word in keys]
    return table(["word", "setup", *SCORES.values()], lines)


def summary(rows: Sequence[Row]) -> str:
    """Return Markdown tables of the setups: each score's mean over words with its 95 % interval, and its differences to
    the word itself and between the two setups, word by word."""
    mirrored, not_mirrored = SETUPS
    between = [signed(against(rows, score, mirrored)[not_mirrored]) for score in SCORES]
    text = show_paired(rows, SCORES, ITSELF)
    return text + table_line([f"{not_mirrored} less {mirrored}", *between])


if __name__ == "__main__":
    sys.exit(main())
