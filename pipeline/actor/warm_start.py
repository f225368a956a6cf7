"""Concepts of an earlier run as examples for `init.method` 'amortised': their photos and what was learned from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pipeline.actor.library import LearnedConcept, open_library
from pipeline.config import PhotoConfig
from pipeline.inputs.photos import fetch
from textual_inversion.photos import open_photo
from textual_inversion.start_choice import LearnedExample

log = logging.getLogger(__name__)

MAX_EXAMPLES = 500
"""Every actor reads them before its first concept; a regression gains little from more."""


def load_examples(output: str, model_hash: str, photos: PhotoConfig) -> Iterator[LearnedExample]:
    """Of the run's finished concepts those learned by this model without an adapter, at most `MAX_EXAMPLES`, spread
    evenly over their ids. One whose photos are no longer there is left out. One after the other, as their photos
    together may not fit in memory.

    Raises ValueError at the end if there was none.
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
    try:
        return LearnedExample(embedding, [open_photo(fetch(uri, photos)) for uri in concept.images])
    except (OSError, ValueError) as error:
        log.warning("concept %s of an earlier run is no example: %s", concept.name, error)
        return None
