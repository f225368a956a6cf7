"""Read what concepts start from: embeddings of files that rows of the manifest name, those of an earlier run for
`init.method` 'earlier' and with their photos as examples for 'amortised', and the encoder of 'encoder'."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pipeline.actor.library import LearnedConcept, open_library
from pipeline.config import PhotoConfig, RunConfig
from pipeline.inputs.models import MAX_ENCODER_BYTES, extractor_hash, locate
from pipeline.inputs.photos import fetch, fetch_as_planned
from pipeline.ledger.plan import ConceptTask
from pipeline.store.addresses import read_bytes
from pipeline.store.errors import InputChanged
from pipeline.store.redact import redact
from textual_inversion.dialects import parse_embedding
from textual_inversion.encoder_file import TrainedEncoder, check_adapter, load_encoder
from textual_inversion.errors import BadInput
from textual_inversion.extractors import ImageExtractor, load_extractor
from textual_inversion.families.base import Backbone
from textual_inversion.photos import open_photo
from textual_inversion.start_choice import ChosenStart, LearnedExample

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


def read_encoder(config: RunConfig, backbone: Backbone) -> TrainedEncoder:
    """Read the encoder that `init.encoder` names. Raises ValueError if it cannot be read, or not be used with the run's
    model, extractor and adapter."""
    uri = config.inversion.init.encoder
    try:
        data = read_bytes(uri, MAX_ENCODER_BYTES)
        encoder = load_encoder(data, backbone, extractor_hash(config.encoder_extractor))
        check_adapter(encoder.network.adapter, config.inversion.adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"inversion.init.encoder = {redact(uri)!r}: {redact(str(error))}") from error
    return encoder


def load_encoder_extractor(config: RunConfig, extractor: ImageExtractor | None) -> ImageExtractor | None:
    """Return the extractor that the encoder reads: the one of `init.extractor`, or the run's, which is given. Raises
    ValueError if it cannot be loaded."""
    name = config.inversion.init.extractor
    return load_extractor(locate(name), config.device) if name else extractor


class GivenStarts:
    """Embeddings that concepts start from because their row or the settings name them."""

    def __init__(self, config: RunConfig, model_hash: str) -> None:
        """Find the concepts of the earlier run if `init.method` is 'earlier'. Raises ValueError if it has none.

        `model_hash`: digest of the model that learns.
        """
        init = config.inversion.init
        self._photos = config.photos
        self._model_hash = model_hash
        self._earlier = (
            {concept.name: concept for concept in open_library([init.earlier_run]).concepts}
            if init.method == "earlier"
            else None
        )

    def __call__(self, task: ConceptTask) -> ChosenStart | None:
        """Return the start of a concept; None leaves it to `init.method`.

        Raises BadInput for a file that is no embedding, InputChanged for another than was planned, and OSError if it
        cannot be read at present.
        """
        concept = task.concept
        if concept.start_from:
            place = redact(concept.start_from)
            try:
                data = fetch_as_planned(concept.start_from, self._photos, task.inputs["start_from"])
                embedding = parse_embedding(data, concept.placeholder_token)
            except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise BadInput(f"start_from {place}: {redact(str(error))}") from error
            return ChosenStart(concept, embedding, f"the embedding {place}")
        if self._earlier is None:
            return None
        earlier = self._earlier.get(concept.concept_id)
        if earlier is None:
            return ChosenStart(concept, None, "words, as the earlier run has no such concept")
        try:
            embedding = earlier.read()
        except ValueError as error:
            raise BadInput(f"the earlier run's {redact(str(error))}") from error
        if embedding.metadata.get("model_hash") != self._model_hash:
            return ChosenStart(concept, None, "words, as the earlier run learned it on another model")
        if embedding.num_vectors not in (1, concept.num_vectors):
            reason = f"words, as it has {embedding.num_vectors} vectors in the earlier run"
            return ChosenStart(concept, None, reason)
        return ChosenStart(concept, embedding, f"its rows in the earlier run, {redact(earlier.uri)}")
