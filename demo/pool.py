"""Draw the training pool, captioned scenes, once into the work folder.

Scene `i` depends on the seed and `i` alone, so the pool is the same for any number of workers.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from demo.art import load_atlas
from demo.objects import TRAINING
from demo.world import PICTURE_PX, caption, draw, sample_scene

_CHUNK = 2000


@dataclass(frozen=True, slots=True)
class Pool:
    """Pictures with their captions, names and attributes."""

    pictures: np.ndarray
    """Pictures, uint8 (scene, height, width, 3), memory-mapped."""
    captions: list[str]
    names: list[str]
    attributes: list[tuple[str, ...]]
    """Style, background, tint, size of every scene."""


def _draw_chunk(start: int, work: Path, seed: int) -> tuple[np.ndarray, list[tuple[str, str, list[str]]]]:
    atlas = load_atlas(work)
    pictures = np.empty((_CHUNK, PICTURE_PX, PICTURE_PX, 3), np.uint8)
    rows = []
    for offset in range(_CHUNK):
        rng = np.random.default_rng((seed, start + offset))
        scene = sample_scene(TRAINING, rng)
        rows.append((caption(scene, rng), scene.thing.name, list(scene.attributes)))
        pictures[offset] = np.asarray(draw(scene, atlas, rng))
    return pictures, rows


def build_pool(work: Path, *, count: int, seed: int, workers: int) -> None:
    """Draw `count` scenes (rounded up to whole chunks) unless the pool exists."""
    if (work / "pool.json").exists():
        return
    load_atlas(work)  # build the atlas once, before the workers need it
    starts = range(0, count, _CHUNK)
    rows: list[tuple[str, str, list[str]]] = []
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
        names=[row[1] for row in rows],
        attributes=[tuple(row[2]) for row in rows],
    )
