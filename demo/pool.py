"""Draw the training pool, captioned scenes, once into the work folder.

Scene `i` depends on the seed and `i` alone, so the pool is the same for any number of workers.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from demo.art import TRAINING_SETS, Atlas, load_atlas
from demo.objects import TRAINING
from demo.unnamed import UNNAMED
from demo.world import PICTURE_PX, Scene, caption, draw, sample_scene, sample_unnamed_scene

_CHUNK = 2000
_Row = tuple[str, list[str], list[str]]
"""Caption, names, attributes."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Pictures with their captions, names and attributes."""

    pictures: np.ndarray
    """Pictures, uint8 (scene, height, width, 3), memory-mapped."""
    captions: list[str]
    names: list[tuple[str, ...]]
    """Nouns of every scene's objects, one or two."""
    attributes: list[tuple[str, ...]]
    """Style, background, tint, size, views, relation of every scene."""


@cache
def _atlas(work: Path) -> Atlas:
    return load_atlas(work)


def _draw_chunk(start: int, work: Path, seed: int) -> tuple[np.ndarray, list[_Row]]:
    atlas = _atlas(work)
    pictures = np.empty((_CHUNK, PICTURE_PX, PICTURE_PX, 3), np.uint8)
    rows = []
    for offset in range(_CHUNK):
        rng = np.random.default_rng((seed, start + offset))
        scene = sample_scene(TRAINING, rng)
        rows.append((caption(scene, rng), list(scene.names), list(scene.attributes)))
        pictures[offset] = np.asarray(draw(scene, atlas, rng))
    return pictures, rows


def build_pool(work: Path, *, count: int, seed: int, workers: int) -> None:
    """Draw `count` scenes (rounded up to whole chunks) unless the pool exists."""
    if (work / "pool.json").exists():
        return
    load_atlas(work)  # build the atlas once, before the workers need it
    starts = range(0, count, _CHUNK)
    rows: list[_Row] = []
    shape = (len(starts) * _CHUNK, PICTURE_PX, PICTURE_PX, 3)
    pictures = np.lib.format.open_memmap(work / "pool.npy", mode="w+", dtype=np.uint8, shape=shape)
    with ProcessPoolExecutor(workers) as executor:
        for start, (chunk, chunk_rows) in zip(
            starts, executor.map(partial(_draw_chunk, work=work, seed=seed), starts), strict=True
        ):
            pictures[start : start + _CHUNK] = chunk
            rows.extend(chunk_rows)
    pictures.flush()
    (work / "pool.json").write_text(json.dumps(rows))


def load_pool(work: Path) -> Pool:
    """Open the pool drawn by `build_pool`."""
    rows = json.loads((work / "pool.json").read_text())
    return Pool(
        pictures=np.load(work / "pool.npy", mmap_mode="r"),
        captions=[row[0] for row in rows],
        names=[tuple(row[1]) for row in rows],
        attributes=[tuple(row[2]) for row in rows],
    )


@dataclass(frozen=True, slots=True)
class UnnamedPool:
    """Scenes of objects without a name, and a plain picture of each object."""

    portraits: np.ndarray
    """Pictures of the objects alone on white, uint8 (object, height, width, 3)."""
    pictures: np.ndarray
    """Pictures of the scenes, uint8 (scene, height, width, 3)."""
    captions: list[str]
    """Captions of the scenes; each holds `unnamed.UNNAMED`."""
    objects: np.ndarray
    """Object of each scene, int64 (scene,)."""


_SCENES_PER_OBJECT = 4
_CLASS_NOUN_SHARE = 0.25
"""Share of unnamed scenes whose caption has the noun after the unnamed word, as recipes with a class cue do."""


def _draw_unnamed(work: Path, objects: int, seed: int) -> UnnamedPool:
    atlas = load_atlas(work)
    portraits, pictures, captions = [], [], []
    for index in range(objects):
        rng = np.random.default_rng((seed, index))
        thing = TRAINING[rng.integers(len(TRAINING))]
        art_sets = [art_set for art_set in TRAINING_SETS if atlas.has(art_set, thing.slug)]
        art_set = art_sets[rng.integers(len(art_sets))]
        hue_degrees = rng.uniform(30, 330) if art_set == "noto" or rng.random() < 0.5 else 0.0
        portraits.append(np.asarray(draw(Scene(thing, hue_degrees=hue_degrees), atlas, rng, art_set=art_set)))
        for _ in range(_SCENES_PER_OBJECT):
            noun = f"{UNNAMED} {thing.name}" if rng.random() < _CLASS_NOUN_SHARE else UNNAMED
            scene = sample_unnamed_scene(thing, noun, hue_degrees, rng)
            captions.append(caption(scene, rng))
            pictures.append(np.asarray(draw(scene, atlas, rng, art_set=art_set)))
    owners = np.repeat(np.arange(objects), _SCENES_PER_OBJECT)
    named = np.asarray([UNNAMED in text for text in captions])  # a caption of a style alone names no object
    texts = [text for text in captions if UNNAMED in text]
    return UnnamedPool(np.stack(portraits), np.stack(pictures)[named], texts, owners[named])


def build_unnamed_pool(work: Path, *, objects: int, seed: int) -> None:
    """Draw four scenes of each of `objects` unnamed objects into the work folder unless they are there."""
    path = work / "unnamed.npz"
    if path.exists():
        return
    pool = _draw_unnamed(work, objects, seed)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        portraits=pool.portraits,
        pictures=pool.pictures,
        captions=np.asarray(pool.captions),
        objects=pool.objects,
    )
    temporary.rename(path)


def load_unnamed_pool(work: Path) -> UnnamedPool:
    """Read the scenes drawn by `build_unnamed_pool`."""
    with np.load(work / "unnamed.npz") as stored:
        return UnnamedPool(
            stored["portraits"], stored["pictures"], [str(text) for text in stored["captions"]], stored["objects"]
        )
