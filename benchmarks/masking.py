"""Make photos of a concept on a busy background, with their masks, from photos on a plain one."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from benchmarks.concepts import read_photos
from demo.backgrounds import draw_background
from demo.captions import PLACE_PHRASES
from pipeline.actor.publish import to_png
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept

_WHITE_LEVEL = 235
"""Lowest level of every channel in the corners of a photo on white."""
_DIFFERENCE = 40
"""Largest difference of a background pixel to its neighbour's background, summed over channels, in levels."""
_MARKER = (255, 0, 255)


def is_on_white(photo: Image.Image) -> bool:
    """Return True if all four corners of the photo are white."""
    pixels = np.asarray(photo.convert("RGB"))
    return bool(min(pixels[row, column].min() for row in (0, -1) for column in (0, -1)) >= _WHITE_LEVEL)


def mask_on_white(photo: Image.Image) -> Image.Image:
    """Return the mask of a photo on white, white where the thing is.

    The background is what can be reached from the corners; white inside the thing belongs to the thing.
    """
    filled = photo.convert("RGB")
    right, bottom = filled.width - 1, filled.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        ImageDraw.floodfill(filled, corner, _MARKER, thresh=_DIFFERENCE)
    difference = ImageChops.difference(filled, Image.new("RGB", filled.size, _MARKER)).convert("L")
    return difference.point(lambda level: 255 if level else 0)


def busy_concept(concept: Concept, store: RunStore) -> Concept:
    """Store the concept's photos on white anew in one place of the demo world, with their masks, and return the concept
    with these. The place depends on the concept, and all its photos are taken there. Raises ValueError if no photo is
    on white."""
    plain = [photo for photo in read_photos(concept) if is_on_white(photo)]
    if not plain:
        raise ValueError(f"concept {concept.concept_id!r} has no photo on white")
    seed = crc32(concept.concept_id.encode())
    place = tuple(PLACE_PHRASES)[seed % len(PLACE_PHRASES)]
    images, masks = [], []
    for i, photo in enumerate(plain):
        mask = mask_on_white(photo)
        background = draw_background(place, photo.width, np.random.default_rng((seed, i)))
        busy = Image.fromarray(np.asarray(background).astype(np.uint8)).resize(photo.size)
        busy.paste(photo, (0, 0), mask)
        for names, kind, picture in ((images, "photo", busy), (masks, "mask", mask)):
            path = f"photos/{concept.concept_id}/{kind}-{i}.png"
            store.put(path, to_png(picture))
            names.append(store.uri(path))
    return replace(concept, images=tuple(images), masks=tuple(masks))
