"""Compare sample pictures with the photos of other concepts: pictures that are nearer to those show another thing."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from torch import Tensor

from pipeline.config import RunConfig
from pipeline.inputs.other_concepts import read_others
from pipeline.inputs.photos import open_pictures
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput
from textual_inversion.extractors import ClipExtractor
from textual_inversion.metrics import clip_i

log = logging.getLogger(__name__)


class OtherPhotos:
    """Features of the photos of `gate.others`, read when they are first needed. Threads may share it."""

    def __init__(self, config: RunConfig, extractor: ClipExtractor) -> None:
        self._config = config
        self._extractor = extractor
        self._features: list[tuple[Concept, Tensor]] | None = None
        """Concepts with their photos' features, [photos, dim]; None before they are read."""
        self._reading = threading.Lock()

    def nearest(self, concept: Concept, pictures: Tensor) -> float | None:
        """Return the highest CLIP-I of pictures of a concept to the photos of another one.

        `pictures`: features, [pictures, dim]. A concept is another one if it has another id, no photo in common and the
        same category. Returns None if there is none. Raises OSError if a photo cannot be read now, and ValueError or
        OSError for a manifest that cannot be read (`read_others`).
        """
        own = set(concept.images)
        others = [
            features
            for other, features in self._read()
            if other.concept_id != concept.concept_id
            and other.category == concept.category
            and own.isdisjoint(other.images)
        ]
        return max((clip_i(pictures, features) for features in others), default=None)

    def _read(self) -> list[tuple[Concept, Tensor]]:
        with self._reading:
            if self._features is None:
                self._features = self._of_all()
            return self._features

    def _of_all(self) -> list[tuple[Concept, Tensor]]:
        found = []
        for concept in read_others(self._config.gate.others):
            try:
                photos, _ = open_pictures(replace(concept, masks=()), self._config.photos)
            except BadInput as error:
                log.warning("gate.others: concept %r is left out: %s", concept.concept_id, error)
            else:
                found.append((concept, self._extractor.images(photos)))
        return found
