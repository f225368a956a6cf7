"""Read the concepts and photos that the benchmarks learn."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.store.addresses import absolute, read_bytes
from textual_inversion.concept import Concept
from textual_inversion.photos import open_photo


def read_objects(manifest: str) -> Iterator[Concept]:
    """Yield the manifest's concepts of the category `object`. Raises ValueError for a bad row."""
    for row in read_manifest(absolute(manifest)):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.file}, row {row.row}: {row.reason}")
        if row.concept.category == "object":
            yield row.concept


def read_photos(concept: Concept) -> list[Image.Image]:
    """Read and decode a concept's photos."""
    return [open_photo(read_bytes(uri)) for uri in concept.images]
