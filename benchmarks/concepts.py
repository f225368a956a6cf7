"""Read the concepts and photos that the benchmarks learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from demo.make_manifests import DEMO_CONCEPTS, HERE, PHOTO_BACKGROUNDS
from demo.objects import HELD_OUT
from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.store.addresses import absolute, read_bytes
from textual_inversion.concept import Concept
from textual_inversion.photos import open_mask, open_photo

HELD_OUT_OBJECTS = "held-out"
"""Name of the demo world's held-out objects, in place of a manifest."""


def read_objects(manifest: str = HELD_OUT_OBJECTS) -> Iterator[Concept]:
    """Yield the manifest's concepts of the category `object`, or all held-out objects of the demo world.

    Raises ValueError for a bad row.
    """
    if manifest == HELD_OUT_OBJECTS:
        yield from held_out_objects()
        return
    for row in read_manifest(absolute(manifest)):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.file}, row {row.row}: {row.reason}")
        if row.concept.category == "object":
            yield row.concept


def held_out_objects(images: Path = HERE / "images") -> Iterator[Concept]:
    """Yield the held-out objects of the demo world whose pictures are in the folder, those of the demo run first."""
    by_id = {held.concept_id: held for held in HELD_OUT}
    for name in dict.fromkeys([*DEMO_CONCEPTS, *by_id]):
        paths = [images / name / f"{index}.png" for index in range(len(PHOTO_BACKGROUNDS))]
        if all(path.exists() for path in paths):
            yield Concept(
                concept_id=name,
                placeholder_token=f"<{name}>",
                images=tuple(map(str, paths)),
                initializer=by_id[name].initializer,
            )


def read_photos(concept: Concept) -> list[Image.Image]:
    """Read and decode a concept's photos."""
    return [open_photo(read_bytes(uri)) for uri in concept.images]


def read_masks(concept: Concept, photos: list[Image.Image]) -> list[Image.Image]:
    """Read and decode a concept's masks, one for each photo, or none."""
    return [open_mask(read_bytes(uri), photo) for uri, photo in zip(concept.masks, photos, strict=False)]
