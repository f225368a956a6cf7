"""Ask whether two learned concepts stand in one picture (Gal et al. 2022, sections 4.4 and 6).

Every picture of a pair is compared with the photos of all candidates by a feature extractor. `whole`: the two nearest
candidates of the whole picture are the pair. `halves`: the left and the right half, each alone, are nearest to the one
and the other of the pair, in either order. By chance these are 1 / (K over 2) and 2 / K^2 of K candidates. The same is
asked of pairs of known words, whose candidates are the model's own pictures of the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import comb
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.drawing import Artist, Subject
from benchmarks.intervals import Row, against, over_concepts, signed
from benchmarks.timing import table
from demo.evaluate import halves
from pipeline.report.intervals import Interval
from textual_inversion.metrics import clip_i_per_picture

PROMPTS = ("a photo of a {} next to a {}", "a photo of a {} and a {}")
LEARNED = "two learned concepts"
KNOWN = "two known words"
ALONE = "a photo of a {}"

Features = Callable[[Sequence[Image.Image]], Tensor]


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return as many pairs as there are names, each name once first and once second; one pair of two names."""
    return list(pairwise([*names, names[0]])) if len(names) > 2 else [(names[0], names[1])]


def are_both_named(
    features: Features, pictures: Sequence[Image.Image], pair: tuple[str, str], candidates: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the shares of pictures that show both of the pair, by the whole picture and by halves.

    `candidates`: name -> features of its photos, [m, dim]. Raises ValueError if the pair is not among them.
    """
    if missing := set(pair) - set(candidates):
        raise ValueError(f"no photos of {sorted(missing)[0]!r}")
    names = list(candidates)

    def likeness(shown: Sequence[Image.Image]) -> Tensor:
        seen = features(shown)
        return torch.stack([clip_i_per_picture(seen, real) for real in candidates.values()], 1)

    wanted = sorted(names.index(name) for name in pair)
    whole = likeness(pictures).topk(2, 1).indices.sort(1).values
    cut = likeness([half for picture in pictures for half in halves(picture)]).argmax(1).reshape(-1, 2).sort(1).values
    return {
        name: float((found == torch.tensor(wanted)).all(1).float().mean())
        for name, found in (("whole", whole), ("halves", cut))
    }


def chance(num_candidates: int) -> dict[str, float]:
    """Return the shares that a random choice among the candidates would reach."""
    return {"whole": 1 / comb(num_candidates, 2), "halves": 2 / num_candidates**2}


def measure_pairs(
    artist: Artist,
    extractors: Mapping[str, Features],
    subjects: Sequence[Subject],
    photos: Mapping[str, Sequence[Image.Image]],
    *,
    setup: str,
    count: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield one row for every pair of the subjects, prompt and extractor.

    `photos`: name -> its photos; a subject without any has its pictures drawn.
    """
    shown = {each.name: photos.get(each.name) or artist.draw(ALONE, [each], 5, seed) for each in subjects}
    candidates = {
        name: {subject: features(real) for subject, real in shown.items()} for name, features in extractors.items()
    }
    by_name = {subject.name: subject for subject in subjects}
    for pair in pairs_of(list(by_name)):
        for prompt in PROMPTS:
            pictures = artist.draw(prompt, [by_name[name] for name in pair], count, seed)
            for name, features in extractors.items():
                shares = are_both_named(features, pictures, pair, candidates[name])
                yield {
                    "setup": setup,
                    "concept_id": " + ".join(pair),
                    "seed": seed,
                    "prompt": prompt,
                    "extractor": name,
                    "candidates": len(subjects),
                    **shares,
                }


def show_pairs(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the shares of pictures that show both, over pairs, beside chance."""
    lines: list[list[object]] = []
    for prompt, name in dict.fromkeys((row["prompt"], row["extractor"]) for row in rows):
        some = [row for row in rows if (row["prompt"], row["extractor"]) == (prompt, name)]
        for setup in dict.fromkeys(row["setup"] for row in some):
            of_setup = [row for row in some if row["setup"] == setup]
            random = chance(of_setup[0]["candidates"])
            pairs = len({row["concept_id"] for row in of_setup})
            cells = [f"{over_concepts(of_setup, score)[setup]} ({random[score]:.3f})" for score in random]
            lines.append([prompt, name, setup, pairs, *cells])
    titles = ["prompt", "extractor", "", "pairs", "both named, whole picture (by chance)", "by halves (by chance)"]
    return table(titles, lines)


def difference_to_chance(rows: Sequence[Row], score: str) -> Interval | None:
    """Return the mean over pairs of learned concepts of a share less what chance gives."""
    learned = [row for row in rows if row["setup"] == LEARNED]
    lower = [{**row, "setup": "chance", score: chance(row["candidates"])[score]} for row in learned]
    return against([*learned, *lower], score, "chance").get(LEARNED) if learned else None


def verdict(rows: Sequence[Row]) -> str:
    """Return a sentence about the shares by halves, over both prompts and all extractors."""
    found = difference_to_chance(rows, "halves")
    share = over_concepts([row for row in rows if row["setup"] == LEARNED], "halves").get(LEARNED)
    return f"By halves, {share} of the pictures show both learned concepts, {signed(found)} above chance.\n"
