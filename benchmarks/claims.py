"""Measure the claims of Textual Inversion (Gal et al. 2022) on the demo world, one question each, with intervals.

    python -m benchmarks.claims --jobs 2                          # all five questions
    python -m benchmarks.claims --only composition bias --seeds 0 1 2
    python -m benchmarks.claims --only distortion --concepts 16 --steps 500 --jobs 2

`distortion`: the order of section 5 on the two axes: rates (low, the paper's, high), two and three vectors,
progressive, regularised, per-image tokens and people's captions, each less the paper's setup (benchmarks/setups.py).
`composition`: two learned concepts named in one picture (benchmarks/composition.py).
`bias`: colours of a word before and after it is learned anew (benchmarks/colours.py).
`style`: a held-out style carried over to known objects (benchmarks/styles.py).
`mask`: learning from photos on a busy background with and without their masks (benchmarks/masking.py).

`distortion` and `mask` measure rows as `benchmarks.methods` does, go on where they stopped, and take its time: about
half a minute of one core a row of the demo model, with 12 and 2 setups. The others learn the concepts of the manifests
by `pipeline.run` (a minute or two a seed; a later call takes what is there) and draw 64 pictures of a word, `--samples`
of every other prompt: some minutes a seed. Rows go to `<question>.json`, tables to `claims.md` of the output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from transformers import CLIPModel, CLIPTokenizer

from benchmarks.colours import measure_colours, show_colours
from benchmarks.comparison import show_scores
from benchmarks.composition import KNOWN, LEARNED, measure_pairs, show_pairs, verdict
from benchmarks.concepts import read_objects
from benchmarks.drawing import Artist, Subject, learn_manifest, read_images
from benchmarks.intervals import Row, against, signed
from benchmarks.jobs import make_jobs, measure_all
from benchmarks.masking import busy_concept
from benchmarks.methods import add_options, configure, measure_setups, scoring_of, split
from benchmarks.setups import Setup, find
from benchmarks.styles import OBJECTS, measure_styles, show_styles
from benchmarks.timing import heading, say, table
from demo.evaluate import CaptionClassifier
from demo.make_manifests import DIVERSE_CONCEPT, DIVERSE_WORD
from pipeline.actor.library import Library
from pipeline.actor.model_loading import load_model
from pipeline.bulk.protocols import choose_protocol
from pipeline.inputs.models import locate
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from pipeline.use import OBJECT_PROMPT
from textual_inversion.extractors import ClipExtractor, load_extractor
from textual_inversion.weights import load_pretrained

BASE = "ti-paper"
ORDER = (
    ("a random photo is no nearer to the photos", "image-only", "clip_i", 0),
    ("the high rate is nearer to the photos", "high-lr", "clip_i", 1),
    ("the high rate follows the prompt less", "high-lr", "clip_t", -1),
    ("the low rate is farther from the photos", "low-lr", "clip_i", -1),
    ("the low rate follows the prompt more", "low-lr", "clip_t", 1),
    ("two vectors are no nearer to the photos", "2-word", "clip_i", 0),
    ("two vectors follow the prompt less", "2-word", "clip_t", -1),
    ("three vectors are no nearer to the photos", "3-word", "clip_i", 0),
    ("three vectors follow the prompt less", "3-word", "clip_t", -1),
    ("progressive vectors follow the prompt less", "progressive", "clip_t", -1),
    ("holding rows near the initializer keeps them from the photos", "regularised", "clip_i", -1),
    ("holding rows near the initializer follows the prompt more", "regularised", "clip_t", 1),
    ("per-image tokens follow the prompt less", "per-image", "clip_t", -1),
    ("short captions are farther from the photos", "short-captions", "clip_i", -1),
    ("short captions follow the prompt less", "short-captions", "clip_t", -1),
    ("long captions are farther from the photos", "long-captions", "clip_i", -1),
    ("long captions follow the prompt less", "long-captions", "clip_t", -1),
)
"""Claims of section 5 and its Fig. 10 on both axes: text, setup, score, and the sign of its difference to the paper's
own setup; 0 where the paper finds both on a par."""
MASKS = {
    "unmasked": Setup(what="the whole photo is learned", uses_masks=False),
    "masked": Setup(what="the loss counts where the mask is white"),
}
_BIAS_GUIDANCE = 1.5
"""Guidance scale of the pictures whose colours are counted, as in `demo.examples`: a high scale draws every picture
towards the one that fits the word best."""


def main(arguments: list[str] | None = None) -> int:
    """Measure the questions asked for and write their tables; return 1 if a row failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(1)
    claims = Claims(options)
    text = heading("Claims of Textual Inversion", "benchmarks.claims", arguments)
    for name in options.only:
        text += f"## {name}\n\n{QUESTIONS[name](claims)}\n"
        claims.store.put("claims.md", text.encode())
    say(f"{text}{claims.store.uri('claims.md')}\n")
    return 1 if claims.failures else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), metavar="QUESTION")
    parser.add_argument("--learned", default="manifests/demo.parquet", help="objects and styles to draw with")
    parser.add_argument("--examples", default="manifests/examples.parquet", help="manifest of the diverse words")
    parser.add_argument("--diverse", nargs="+", default=[f"{DIVERSE_CONCEPT}:{DIVERSE_WORD}"], metavar="CONCEPT:WORD")
    parser.add_argument("--bias-pictures", type=int, default=64, help="pictures whose colours are counted")
    parser.add_argument("--objects", nargs="+", default=OBJECTS, metavar="WORD", help="known objects to draw in styles")
    add_options(parser, output="output/claims")
    return parser.parse_args(arguments)


@dataclass
class Claims:
    """The models and the learned concepts that questions share, made when first needed."""

    options: argparse.Namespace
    failures: int = 0

    @cached_property
    def store(self) -> RunStore:
        return RunStore(absolute(self.options.output))

    @cached_property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in split(self.options.seeds)]

    @cached_property
    def artist(self) -> Artist:
        config = configure(self.options)
        return Artist(load_model(config), choose_protocol(config).sampling)

    @cached_property
    def clip(self) -> ClipExtractor:
        return ClipExtractor(locate(configure(self.options).extractor), "cpu")

    @cached_property
    def extractors(self) -> dict[str, Any]:
        """Function of pictures that returns features, by the extractor's name."""
        named = scoring_of(self.options, ()).extractors
        return {"clip": self.clip.images} | {name: load_extractor(locate(path), "cpu").images for name, path in named}

    def learned(self, manifest: str, seed: int) -> Library:
        """Return a manifest's concepts, learned with this seed; a later question takes what an earlier one learned."""
        name = manifest.rpartition("/")[2].partition(".")[0]
        settings = ["device=cpu", f"inversion.steps={self.options.steps}", *self.options.set]
        return learn_manifest(
            manifest, self.store.uri(f"learned/{name}-{seed}"), seed, settings, jobs=self.options.jobs
        )

    def keep(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.store.put(f"{name}.json", json.dumps(rows, indent=1).encode())


def ask_distortion(claims: Claims) -> str:
    """Measure the setups of section 5; return their table and the order that the paper claims."""
    names = [BASE, *dict.fromkeys(setup for _, setup, _, _ in ORDER)]
    setups = {name: find(name) for name in names}
    options = argparse.Namespace(**{**vars(claims.options), "output": claims.store.uri("distortion")})
    rows, failures = measure_setups(options, setups)
    claims.failures += len(failures)
    claims.keep("distortion", rows)
    return f"{show_scores(rows, BASE, {n: s.what for n, s in setups.items()})}\n{show_order(rows)}" if rows else ""


def show_order(rows: Sequence[Row]) -> str:
    """Return a Markdown table: each claim of the order, the difference measured, and what it says of the claim."""
    lines: list[list[object]] = []
    for text, setup, score, sign in ORDER:
        found = against(rows, score, BASE).get(setup)
        if found is None:
            answer = "not measured"
        elif sign == 0:
            answer = "as claimed" if found.sign == 0 else "not so"
        else:
            answer = {sign: "as claimed", 0: "undecided"}.get(found.sign, "not so")
        lines.append([text, f"{setup} less {BASE}", score.upper().replace("_", "-"), signed(found), answer])
    return table(["claim", "difference", "score", "mean and 95 % interval", "here"], lines)


def ask_composition(claims: Claims) -> str:
    """Draw pairs of learned concepts and of known words; return the shares in which both are named."""
    rows: list[dict[str, Any]] = []
    for seed in claims.seeds:
        library = claims.learned(claims.options.learned, seed)
        concepts = [each for each in library.concepts if each.category == "object"]
        concepts = list(islice(concepts, claims.options.concepts or None))
        words = list(dict.fromkeys(concept.initializer for concept in concepts))
        for setup, subjects, photos in (
            (LEARNED, [Subject.of_concept(each) for each in concepts], {c.name: read_images(c) for c in concepts}),
            (KNOWN, [Subject.of_word(word) for word in words], {}),
        ):
            found = measure_pairs(
                claims.artist,
                claims.extractors,
                subjects,
                photos,
                setup=setup,
                count=claims.options.samples,
                seed=seed,
            )
            rows += found
    claims.keep("composition", rows)
    return f"{show_pairs(rows)}\n{verdict(rows)}"


def ask_bias(claims: Claims) -> str:
    """Draw words and the same words learned anew; return the entropy of their colours and the mixed ones."""
    rows: list[dict[str, Any]] = []
    artist = replace(claims.artist, sampling=replace(claims.artist.sampling, guidance_scale=_BIAS_GUIDANCE))
    for seed in claims.seeds:
        library = claims.learned(claims.options.examples, seed)
        for pair in claims.options.diverse:
            name, _, word = pair.partition(":")
            concept = library.named(name)
            count = claims.options.bias_pictures
            shown = {
                "photos": read_images(concept),
                "the word": artist.draw(OBJECT_PROMPT, [Subject.of_word(word)], count, seed),
                "learned anew": artist.draw(OBJECT_PROMPT, [Subject.of_concept(concept)], count, seed),
            }
            rows += [
                {"word": word, "setup": setup, "seed": seed, **measure_colours(claims.clip, word, pictures)}
                for setup, pictures in shown.items()
            ]
    claims.keep("bias", rows)
    return show_colours(rows)


def ask_style(claims: Claims) -> str:
    """Draw known objects in learned styles; return the shares in which style and object are named."""
    rows: list[dict[str, Any]] = []
    classifier = load_classifier(locate(configure(claims.options).extractor))
    for seed in claims.seeds:
        styles = [each for each in claims.learned(claims.options.learned, seed).concepts if each.category == "style"]
        if not styles:
            return f"{claims.options.learned} holds no style.\n"
        rows += measure_styles(
            claims.artist,
            claims.extractors,
            classifier,
            [Subject.of_concept(style) for style in styles],
            {style.name: read_images(style) for style in styles},
            objects=claims.options.objects,
            count=claims.options.samples,
            seed=seed,
        )
    claims.keep("style", rows)
    return show_styles(rows)


def load_classifier(path: str) -> CaptionClassifier:
    """Load the classifier of `demo.evaluate`."""
    return CaptionClassifier(load_pretrained(CLIPModel, path).eval(), CLIPTokenizer.from_pretrained(path))


def ask_mask(claims: Claims) -> str:
    """Learn from photos on a busy background with and without masks; return the scores against the plain photos."""
    options = claims.options
    store = RunStore(absolute(f"{claims.store.root}/mask"))
    plain = list(read_objects(options.manifest))
    concepts = [busy_concept(concept, store) for concept in islice(plain, options.concepts or None)]
    scoring = scoring_of(options, plain)
    jobs = make_jobs(
        MASKS,
        concepts,
        configure(options),
        steps=options.steps,
        seeds=claims.seeds,
        overrides=options.set,
        scoring=scoring,
    )
    rows, failures = measure_all(list(jobs), store.root, scoring, processes=options.jobs, at_once=options.at_once)
    claims.failures += len(failures)
    claims.keep("mask", rows)
    return show_scores(rows, "unmasked", {name: setup.what for name, setup in MASKS.items()}) if rows else ""


QUESTIONS: dict[str, Callable[[Claims], str]] = {
    "distortion": ask_distortion,
    "composition": ask_composition,
    "bias": ask_bias,
    "style": ask_style,
    "mask": ask_mask,
}


if __name__ == "__main__":
    sys.exit(main())
