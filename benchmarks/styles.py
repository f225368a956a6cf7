"""Ask whether a learned style carries over to objects that it was not learned from (Gal et al. 2022, section 4.3).

A picture's style is the direction in which its features differ from those of the plain look of the same object, since
pictures of one object are alike in any style (the "directional" comparison of Gal et al. 2022, "StyleGAN-NADA", section
4). Each style's own direction is the mean over the objects that the held-out styles were photographed from: features of
the style's pictures less those of the model's plain pictures. Exemplars of a style with a name are the model's own
pictures of the name; those of a held-out style are its photos. `named`: the direction nearest to the picture's, by
cosine, is that of the style asked for. `object_named`: CLIP chooses the object's name among 100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.drawing import Artist, Subject
from benchmarks.intervals import Row, over_concepts
from benchmarks.timing import table
from demo import captions
from demo.evaluate import CaptionClassifier
from demo.make_manifests import style_scenes
from demo.objects import TRAINING
from pipeline.use import STYLED_OBJECT_PROMPT

PLAIN = "a photo of a {}"
OBJECTS = ("cat", "dog", "house", "lemon", "bus", "rose", "chair", "ship")
"""Known objects that styles are carried over to; none is among those that styles were learned from."""
_NUM_NAMES = 100

Features = Callable[[Sequence[Image.Image]], Tensor]


def direction(styled: Tensor, plain: Tensor) -> Tensor:
    """Return the unit direction from the mean of plain features, [n, dim], to that of styled ones, [m, dim]: [dim]."""
    return F.normalize(styled.mean(0) - plain.mean(0), dim=0)


def nearest_styles(pictures: Tensor, plain: Tensor, styles: Mapping[str, Tensor]) -> list[str]:
    """Return the name of the style nearest to each picture.

    `pictures`: features of pictures of one object, [n, dim]; `plain`: features of its plain look, [m, dim]; `styles`:
    name -> direction, [dim].
    """
    names = list(styles)
    directions = F.normalize(pictures - plain.mean(0), dim=1)
    return [names[i] for i in (directions @ torch.stack(list(styles.values())).T).argmax(1).tolist()]


def style_directions(
    artist: Artist, features: Features, photos: Mapping[str, Sequence[Image.Image]], count: int, seed: int
) -> dict[str, Tensor]:
    """Return name -> direction of the styles with a name and of the held-out ones, whose photos are given."""
    things = [Subject.of_word(scene.thing.name) for scene in style_scenes()]
    plain = torch.cat([features(artist.draw(PLAIN, [thing], count, seed)) for thing in things])
    found = {name: direction(features(real), plain) for name, real in photos.items()}
    for name, templates in captions.STYLE_TEMPLATES.items():
        shown = torch.cat([features(artist.draw(templates[0], [thing], count, seed)) for thing in things])
        found[name] = direction(shown, plain)
    return found


def measure_styles(
    artist: Artist,
    extractors: Mapping[str, Features],
    classifier: CaptionClassifier,
    learned: Sequence[Subject],
    photos: Mapping[str, Sequence[Image.Image]],
    *,
    objects: Sequence[str],
    count: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield one row for every style, object and extractor: learned styles, their initializers' names in their place,
    and the styles with a name, by it."""
    directions = {name: style_directions(artist, each, photos, count, seed) for name, each in extractors.items()}
    asked = [(f"learned {subject.name}", subject.name, subject) for subject in learned]
    asked += [
        (f"initializer of {subject.name}", subject.name, Subject.of_word(subject.concept.initializer))
        for subject in learned
        if subject.concept
    ]
    asked += [(f"{name}, by name", name, Subject.of_word(text)) for name, text in captions.STYLE_NAMES.items()]
    names = [thing.name for thing in TRAINING if thing.name not in objects][: _NUM_NAMES - len(objects)]
    options = [captions.fill(PLAIN, name) for name in (*objects, *names)]
    for index, thing in enumerate(objects):
        plain = artist.draw(PLAIN, [Subject.of_word(thing)], count, seed)
        for setup, style, subject in asked:
            pictures = artist.draw(STYLED_OBJECT_PROMPT, [Subject.of_word(thing), subject], count, seed)
            chosen = classifier.choose(pictures, [options] * len(pictures))
            for name, features in extractors.items():
                found = nearest_styles(features(pictures), features(plain), directions[name])
                yield {
                    "setup": setup,
                    "concept_id": thing,
                    "seed": seed,
                    "extractor": name,
                    "styles": len(directions[name]),
                    "named": sum(each == style for each in found) / len(found),
                    "object_named": float((chosen == index).mean()),
                }


def show_styles(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the shares over objects, beside chance."""
    lines: list[list[object]] = []
    for name in dict.fromkeys(row["extractor"] for row in rows):
        some = [row for row in rows if row["extractor"] == name]
        named = over_concepts(some, "named")
        kept = over_concepts(some, "object_named")
        random = 1 / some[0]["styles"]
        lines += [[name, setup, f"{named[setup]} ({random:.3f})", kept[setup]] for setup in named]
    return table(["extractor", "style in the prompt", "style named (by chance)", "object named, of 100"], lines)
