"""Draw the concepts that the demo's encoder is trained on: `python -m demo.encoder_concepts`.

Writes pictures and `manifest.parquet` into `demo/.work/encoder`, for `python -m pipeline.train_encoder`. A concept is a
taught object as one art set draws it, with its own or with rotated hues; after twelve concepts of each object follow as
many of objects that are made up of two (`made_up`). Held-out objects and art sets are never drawn. Its first pictures
show it as a concept of the demo is photographed, the others in scenes that their captions describe. The initializer is
mostly another noun near the object, because the initializer of a held-out object is such a word, too. Concept `i`
depends on the seed and `i` alone.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demo.art import TRAINING_SETS, Atlas, load_atlas
from demo.made_up import make_up
from demo.make_manifests import PHOTO_BACKGROUNDS
from demo.objects import TRAINING
from demo.world import Scene, caption, draw, sample_unnamed_scene
from textual_inversion.extractors import ClipExtractor
from textual_inversion.prompts import HOLE

HERE = Path(__file__).parent
_PHOTOS, _SCENES = 4, 2
"""Pictures of a concept as photographed, and in captioned scenes."""
_NEAR_NOUNS = 3
_OWN_NOUN_SHARE = 0.25
"""Share of concepts whose initializer is the object's own noun."""
_CHUNK = 100
_PLAIN = 12 * len(TRAINING)
"""Concepts of taught objects as they are; those after them are made up."""
_HELD_OUT_EVERY = 20
_HELD_OUT_OFFSET = 7
SCHEMA = pa.schema(
    [
        ("concept_id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("initializer", pa.string()),
        ("category", pa.string()),
    ]
)


@cache
def _atlas(work: Path) -> Atlas:
    return load_atlas(work)


def near_nouns(clip: ClipExtractor) -> dict[str, list[str]]:
    """Return for each taught noun the nouns nearest to it by the CLIP's text features, the nearest first."""
    nouns = [thing.name for thing in TRAINING]
    features = clip.texts([f"a photo of a {noun}" for noun in nouns])
    cosines = (features @ features.T).fill_diagonal_(-1)
    nearest = cosines.topk(_NEAR_NOUNS).indices.tolist()
    return {noun: [nouns[i] for i in indices] for noun, indices in zip(nouns, nearest, strict=True)}


def is_held_out(index: int) -> bool:
    """Return True for a concept of an object that takes no part in the training."""
    return index % len(TRAINING) % _HELD_OUT_EVERY == _HELD_OUT_OFFSET


def _with_made_up(atlas: Atlas, art_set: str, index: int, rng: np.random.Generator) -> Atlas:
    """Return an atlas whose drawing of the concept's object is made up of it and of another object."""
    slug = TRAINING[index % len(TRAINING)].slug
    others = [each.slug for i, each in enumerate(TRAINING) if atlas.has(art_set, each.slug) and not is_held_out(i)]
    other = atlas.sprite(art_set, others[rng.integers(len(others))])
    return Atlas(sprites={(art_set, slug): make_up(atlas.sprite(art_set, slug), other, rng)})


def _captioned_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Draw a caption that names the scene's object; a caption of a style alone does not."""
    text = caption(scene, rng)
    while HOLE not in text:
        text = caption(scene, rng)
    return text


def draw_concept(
    index: int, seed: int, atlas: Atlas, near: dict[str, list[str]]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Return a concept's manifest row, with file names in place of addresses, and its pictures."""
    rng = np.random.default_rng((seed, index))
    thing = TRAINING[index % len(TRAINING)]
    art_sets = [art_set for art_set in TRAINING_SETS if atlas.has(art_set, thing.slug)]
    art_set = art_sets[rng.integers(len(art_sets))]
    hue_degrees = float(rng.uniform(30, 330)) if rng.random() < 0.6 else 0.0
    scenes = [
        Scene(thing, background=PHOTO_BACKGROUNDS[rng.integers(len(PHOTO_BACKGROUNDS))], noun=HOLE,
              hue_degrees=hue_degrees)
        for _ in range(_PHOTOS)
    ]  # fmt: skip
    scenes += [sample_unnamed_scene(thing, HOLE, hue_degrees, rng) for _ in range(_SCENES)]
    concept_id = f"{thing.name.replace(' ', '-')}-{index}"
    if index >= _PLAIN and not is_held_out(index):
        atlas = _with_made_up(atlas, art_set, index, rng)
    is_own = rng.random() < _OWN_NOUN_SHARE
    row = {
        "concept_id": concept_id,
        "images": [f"images/{concept_id}-{number}.png" for number in range(len(scenes))],
        "captions": [_captioned_scene(scene, rng) for scene in scenes],
        "initializer": thing.name if is_own else near[thing.name][rng.integers(_NEAR_NOUNS)],
        "category": "object",
    }
    return row, [draw(scene, atlas, rng, art_set=art_set) for scene in scenes]


def _write_chunk(start: int, work: Path, seed: int, count: int, near: dict[str, list[str]]) -> list[dict[str, Any]]:
    rows = []
    for index in range(start, min(start + _CHUNK, count)):
        row, pictures = draw_concept(index, seed, _atlas(work), near)
        for name, picture in zip(row["images"], pictures, strict=True):
            picture.save(work / "encoder" / name)
        rows.append(row)
    return rows


def main() -> None:
    """Draw all concepts and write their manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--clip", type=Path, default=HERE / "clip")
    parser.add_argument("--concepts", type=int, default=2 * _PLAIN)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    (options.work / "encoder" / "images").mkdir(parents=True, exist_ok=True)
    load_atlas(options.work)  # build the atlas once, before the workers need it
    near = near_nouns(ClipExtractor(str(options.clip), "cpu"))
    write = partial(_write_chunk, work=options.work, seed=options.seed, count=options.concepts, near=near)
    with ProcessPoolExecutor(options.workers) as executor:
        rows = [row for rows in executor.map(write, range(0, options.concepts, _CHUNK)) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), options.work / "encoder" / "manifest.parquet")


if __name__ == "__main__":
    main()
