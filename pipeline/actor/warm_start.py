"""Read concepts of an earlier run as examples for `init.method` 'amortised': their photos and their embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pipeline.actor.library import LearnedConcept, open_library
from pipeline.config import PhotoConfig
from pipeline.inputs.photos import fetch, fetch_as_planned
from pipeline.store.errors import InputChanged
from textual_inversion.errors import BadInput
from textual_inversion.photos import open_photo
from textual_inversion.start_choice import LearnedExample

log = logging.getLogger(__name__)

MAX_EXAMPLES = 500
"""Largest number of examples: every actor reads them before its first concept, and a regression gains little from
more."""


def load_examples(output: str, model_hash: str, photos: PhotoConfig) -> Iterator[LearnedExample]:
    """Yield the run's finished concepts that this model learned without an adapter, at most `MAX_EXAMPLES`, spread
    evenly over their ids, one by one, as their photos together may not fit in memory.

    A concept is left out if its photos are no longer those that its record names. Raises ValueError for an embedding
    that is not the one of its record, and at the end if there was no example.
    """
    concepts = sorted(open_library([output]).concepts, key=lambda concept: concept.name)
    count = min(MAX_EXAMPLES, len(concepts))
    found = 0
    for i in range(count):
        example = _read(concepts[i * len(concepts) // count], model_hash, photos)
        if example is not None:
            found += 1
            yield example
    if not found:
        raise ValueError(
            f"inversion.init.earlier_run = {output!r}: none of its {len(concepts)} concepts was learned by this model "
            "without an adapter from photos that are still there; name another run, or none"
        )


def _read(concept: LearnedConcept, model_hash: str, photos: PhotoConfig) -> LearnedExample | None:
    embedding = concept.read()
    if embedding.metadata.get("model_hash") != model_hash or embedding.adapter:
        return None
    hashes = concept.image_hashes or ("",) * len(concept.images)
    pairs = zip(concept.images, hashes, strict=True)
    try:
        return LearnedExample(embedding, [open_photo(_fetch(uri, photos, planned)) for uri, planned in pairs])
    except (OSError, BadInput, InputChanged) as error:
        log.warning("concept %s of an earlier run is no example: %s", concept.name, error)
        return None


def _fetch(uri: str, photos: PhotoConfig, planned: str) -> bytes:
    return fetch_as_planned(uri, photos, planned) if planned else fetch(uri, photos)
