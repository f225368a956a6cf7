"""Choice of a concept's initial rows by `init.method`: by the initializer alone, or by the photos as well.

The methods `auto` and `amortised` compare the photos with words by a feature extractor with text features; the
regression of `amortised` is in `amortise`. The network of `encoder` is in `encoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion import amortise
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig
from textual_inversion.encoder import PhotoFeatures, canonical_order
from textual_inversion.encoder_file import TrainedEncoder
from textual_inversion.encoder_header import BY_ENCODER, ENCODER_UNSURE
from textual_inversion.errors import NotFinite
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors, encoder_output, word_vectors

if TYPE_CHECKING:
    from textual_inversion.extractors import ClipExtractor, ImageExtractor


@dataclass(frozen=True, slots=True)
class ChosenStart:
    """Initial rows chosen for a concept."""

    concept: Concept
    """The concept, with the chosen word as its initializer where the method chooses one."""
    embedding: LearnedEmbedding | None
    """Initial rows for `Assignment.start`; None leaves them to the initializer."""
    reason: str
    """Method and its choice in words, for the record, with the reason if the method was not relied on."""
    steps: int | None = None
    """Largest number of steps for `Assignment.steps`; None leaves it to the settings."""


@dataclass(frozen=True, slots=True)
class LearnedExample:
    """A concept that was learned before by the same model, to fit `amortised` on."""

    embedding: LearnedEmbedding
    """Embedding that was learned, without an adapter."""
    photos: Sequence[Image.Image]
    """Photos that it was learned from."""


class StartChooser:
    """Chooses the initial rows of concepts as `init.method` says.

    Computations that all concepts share are done once, on construction. A choice depends on the model, the extractor,
    the settings, the seed and the concept alone. Threads may share one chooser.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: InitConfig,
        extractor: ClipExtractor | None = None,
        *,
        seed: int = 0,
        examples: Iterable[LearnedExample] = (),
        encoder: TrainedEncoder | None = None,
        encoder_extractor: ImageExtractor | None = None,
    ) -> None:
        """Prepare the method, which for `amortised` fits the regression.

        extractor: needed by `auto` and `amortised`.
        examples: concepts that `amortised` is fitted on besides words, read one after the other.
        encoder: needed by `encoder`.
        encoder_extractor: extractor that the encoder was trained with; None is `extractor`.
        Raises ValueError if the extractor or the encoder is needed and missing, or if there are fewer than three words.
        """
        self._backbone = backbone
        self._method = config.method
        self._extractor = extractor
        self._unsure_steps = config.unsure_steps
        if config.method not in ("auto", "amortised", "encoder"):
            return
        if config.method == "encoder":
            encoder_extractor = encoder_extractor or extractor
            if encoder is None or encoder_extractor is None:
                raise ValueError("init.method 'encoder' needs a trained encoder and the extractor that it reads")
            self._encoder = encoder
            self._photo_features = PhotoFeatures(backbone, encoder_extractor, encoder.network.config)
            return
        if extractor is None:
            raise ValueError(f"init.method {config.method!r} looks at the photos with a CLIP; set `extractor`")
        self._words = list(config.words) or backbone.single_token_words()
        if len(self._words) < 3:
            raise ValueError(f"init.words = {self._words!r}: must be 3 words or more for init.method {config.method!r}")
        self._text_features = extractor.texts([amortise.WORD_PROMPT.format(word) for word in self._words])
        if config.method == "amortised":
            self._regression = self._fit_regression(extractor, seed, examples)

    def __call__(self, concept: Concept, photos: Sequence[Image.Image]) -> ChosenStart:
        """Choose the initial rows of a concept.

        Raises BadInput if the concept lacks what the method needs, and NotFinite for photos of features that are not.
        """
        if self._method in ("words", "earlier"):  # rows of an earlier run are given by the caller, where it has some
            return ChosenStart(concept, None, "words")
        if self._method == "encoder_output":
            return _start(concept, encoder_output(concept, self._backbone), "encoder_output")
        if self._method == "encoder":
            return self._start_by_encoder(concept, photos)
        assert self._extractor is not None
        feature = _mean_feature(self._extractor, photos)
        if self._method == "auto":
            return self._start_at_nearest_word(concept, feature)
        return self._start_by_regression(concept, feature, self._extractor)

    def _start_at_nearest_word(self, concept: Concept, feature: Tensor) -> ChosenStart:
        cosines = self._text_features @ feature
        best = int(cosines.argmax())
        concept = replace(concept, initializer=self._words[best])
        reason = f"auto: {concept.initializer} (cosine {float(cosines[best]):.2f})"
        return _chosen(concept, class_vectors(concept, self._backbone), reason)

    def _start_by_regression(self, concept: Concept, feature: Tensor, extractor: ClipExtractor) -> ChosenStart:
        initializer_vectors = class_vectors(concept, self._backbone)
        word = None
        if concept.initializer:
            (text_feature,) = extractor.texts([amortise.WORD_PROMPT.format(concept.initializer)])
            word = text_feature, initializer_vectors
        predicted = self._regression.predict(feature, word)
        if predicted.unreliable_because:
            reason = f"words, amortised was unsure: {predicted.unreliable_because}"
            return _chosen(concept, initializer_vectors, reason)
        return _chosen(concept, predicted.vectors, "amortised")

    def _start_by_encoder(self, concept: Concept, photos: Sequence[Image.Image]) -> ChosenStart:
        """Make the rows in a pass of this concept alone, so that they do not depend on the concepts beside it."""
        encoder = self._encoder
        features = self._photo_features(canonical_order(photos))
        if not features.isfinite().all():
            raise NotFinite("features of the photos are not finite; check the photos and the extractor's precision")
        reason = encoder.why_unreliable(concept, features)
        if reason:
            start = _chosen(concept, class_vectors(concept, self._backbone), f"{ENCODER_UNSURE}: {reason}")
            return replace(start, steps=self._unsure_steps)
        classes = class_vectors(concept, self._backbone)
        return ChosenStart(concept, encoder.embedding(concept.placeholder_token, features, classes), BY_ENCODER)

    def _fit_regression(
        self, extractor: ClipExtractor, seed: int, examples: Iterable[LearnedExample]
    ) -> amortise.StartRegression:
        backbone = self._backbone
        words = self._words
        vectors = word_vectors(words, backbone)
        photo_features = []
        for example in examples:
            photo_features.append(_mean_feature(extractor, example.photos))
            for key in vectors:
                vectors[key].append(example.embedding.vectors[key].float().mean(0))
        drawn_words = amortise.choose_words_to_draw(len(words))
        pictures = amortise.draw_words(backbone, [words[i] for i in drawn_words], seed)
        return amortise.fit_start_regression(
            self._text_features,
            {key: torch.stack(rows) for key, rows in vectors.items()},
            extractor.images(pictures),
            drawn_words,
            torch.stack(photo_features) if photo_features else None,
        )


def _mean_feature(extractor: ClipExtractor, photos: Sequence[Image.Image]) -> Tensor:
    """Return the mean of the photos' features, [dim], of unit norm."""
    return F.normalize(extractor.images(photos).mean(0), dim=0)


def _chosen(concept: Concept, vectors: Mapping[str, Tensor], reason: str) -> ChosenStart:
    """Return a start with one vector [dim] for each text encoder, from which all rows of the concept start."""
    return _start(concept, {key: vector[None] for key, vector in vectors.items()}, reason)


def _start(concept: Concept, rows: Mapping[str, Tensor], reason: str) -> ChosenStart:
    """Return a start with these rows [num_vectors or 1, dim] for each text encoder."""
    return ChosenStart(concept, LearnedEmbedding(placeholder_token=concept.placeholder_token, vectors=rows), reason)
