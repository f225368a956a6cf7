"""Invert words that the model knows, and measure how far each learned word stays from the word itself.

    python -m benchmarks.known_words                              # rendered photos, eight words, two setups
    python -m benchmarks.known_words --photos drawn --words cat:dog --seeds 0,1,2

For a known word a perfect embedding exists, the word's own row. Its distance to the learned one needs no feature
extractor: both are drawn from the same noise and compared with the same photos by PSNR and edge strength
(`textual_inversion/fidelity.py`), with CLIP-I beside them. Each word is learned from five photos and from another
word's row, with mirror images and without.
`rendered` photos are drawn like those of the demo's concepts (`demo/make_manifests.py`), which fetches the art once;
`drawn` ones are the model's own pictures of the word, for any model and without a network.

Prints markdown tables; `rows.json` and a sheet of pictures for each word go to the output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from benchmarks.intervals import by_setup
from demo.art import load_atlas
from demo.make_manifests import HERE, concept_scenes
from demo.objects import CORE
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
from textual_inversion.learn import learn_outcomes
from textual_inversion.metrics import clip_i
from textual_inversion.prompts import name_in_prompt
from textual_inversion.rng import seed_for

WORDS = ("cat:dog", "apple:lemon", "bus:truck", "car:jeep", "horse:cow", "fish:whale", "hammer:key", "rose:sunflower")
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
    for row, pictures in measure(models, words, config, options.seeds):
        rows.append(row)
        sys.stderr.write(f"{row['concept_id']}, {row['setup']}, seed {row['seed']}: {row['psnr_db']:.2f} dB\n")
        shown[row["concept_id"]].append((f"{row['setup']}, seed {row['seed']}", pictures))
    for known in words:
        store.put(f"{known.word}.png", to_png(grid(known.photos, shown[known.word])))
    store.put("rows.json", json.dumps(rows, indent=1).encode())
    inversion = config.inversion
    say(f"{len(words)} words, {options.photos} photos, {inversion.steps} steps of {inversion.batch_size}, ")
    say(f"{len(options.seeds)} seeds, {options.samples} pictures of each\n\n{by_word(rows)}\n{summary(rows)}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--words", nargs="+", default=WORDS, metavar="WORD:INITIALIZER")
    parser.add_argument("--photos", default="rendered", choices=("rendered", "drawn"))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
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
    things = [thing for thing in CORE if thing.name == word]
    if not things:
        raise ValueError(f"{word!r} is no core object of the demo world (demo/objects.py); --photos drawn needs none")
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


def mean_over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each setup and word, with the mean of each score over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["setup"], row["concept_id"]), []).append(row)
    return [
        {"setup": setup, "concept_id": word, **{score: fmean(row[score] for row in group) for score in SCORES}}
        for (setup, word), group in groups.items()
    ]


def by_word(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with the scores of each word in each setup."""
    lines = [f"| word | setup | {' | '.join(SCORES.values())} |", "|---" * (len(SCORES) + 2) + "|"]
    for row in sorted(mean_over_seeds(rows), key=lambda row: str(row["concept_id"])):
        cells = [f"{row[score]:.3f}" for score in SCORES]
        lines.append(f"| {row['concept_id']} | {row['setup']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the setups: mean and standard error over words of each score, and of its differences
    to the word itself and between the two setups, word by word."""
    means = mean_over_seeds(rows)
    mirrored, not_mirrored = SETUPS
    lines = [f"| | {' | '.join(SCORES.values())} |", "|---" * (len(SCORES) + 1) + "|"]
    setups = {setup: {row["concept_id"]: row for row in of_setup} for setup, of_setup in by_setup(means).items()}
    for setup, words in setups.items():
        cells = [mean_and_error([row[score] for row in words.values()]) for score in SCORES]
        lines.append(f"| {setup} | {' | '.join(cells)} |")
    for setup, base in ((mirrored, ITSELF), (not_mirrored, ITSELF), (not_mirrored, mirrored)):
        pairs = [(row, setups[base][word]) for word, row in setups[setup].items()]
        cells = [mean_and_error([row[score] - other[score] for row, other in pairs], sign="+") for score in SCORES]
        lines.append(f"| {setup} less {base} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_error(values: Sequence[float], *, sign: str = "") -> str:
    """Return mean and standard error as text; with `sign` "+", means that are not negative get a plus sign."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.3f}{error}"


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
