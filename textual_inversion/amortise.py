"""Initial rows predicted from photos: a ridge regression from image features to embedding vectors, fitted on words of
the model's vocabulary and on concepts learned before.

The prediction for a concept with an initializer is the initializer's vector, moved by the regression's value of the
difference between the photos' features and the word's. Without an initializer it is the regression's value of the
photos' features.

Fitting on words costs little: CLIP's features of the text "a photo of a WORD" take the place of features of pictures.
Features of texts and of pictures lie apart, though, by about the same offset everywhere (Liang et al. 2022, "modality
gap"). The model therefore draws a few words. The pictures of these words give the offset, and a cross-validation shows
how well a regression fitted without a word predicts the word's vector from its picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.rng import seed_for

WORD_PROMPT = "a photo of a {}"
"""Prompt of a word, for its text features and for its picture."""
NUM_DRAWN_WORDS = 64
"""Number of words drawn for the modality gap and the cross-validation."""
_SAMPLING = SamplingConfig(steps=10, guidance_scale=3.0)
_RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the penalty, in units of the features' sum of squares per dimension; cross-validation picks one."""
_DISTANCE_QUANTILE = 0.95
"""Quantile of the drawn words' distances to their nearest other feature beyond which photos count as too far away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedStart:
    """Vectors predicted for a concept, and the reason not to rely on them, if there is one."""

    vectors: Mapping[str, Tensor]
    """Text encoder key -> [dim] float32, scaled to the known vectors' mean norm (a regression alone shrinks norms)."""
    unreliable_because: str
    """Reason why the vectors should not be used; empty if they may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRegression:
    """A fitted regression from image features to vectors, made by `fit_start_regression`. Matrices are float64."""

    features: Tensor
    """[n, width] features the regression was fitted on, unit norm for texts."""
    modality_gap: Tensor
    """[width] mean offset from features of texts to features of pictures."""
    max_distance: float
    """Largest 1 - cosine to the nearest of `features` at which a prediction counts as reliable."""
    weights: Mapping[str, Tensor]
    """Text encoder key -> [1 + width, dim] weights, the intercept first."""
    norms: Mapping[str, float]
    """Text encoder key -> mean norm of the vectors the regression was fitted on."""
    r_squared: Mapping[str, float]
    """Text encoder key -> fraction of the drawn words' variance that is explained when each word is left out."""

    def predict(self, feature: Tensor, word: tuple[Tensor, Mapping[str, Tensor]] | None = None) -> PredictedStart:
        """Predict a concept's vectors from the feature [width] of its photos.

        `word` describes the concept's initializer: the feature [width] of its text, and its vectors, text encoder key
        -> [dim].
        """
        feature = feature.double() - self.modality_gap
        vectors = {}
        for key, weights in self.weights.items():
            vector = _with_intercept(feature) @ weights
            if word is not None:
                word_feature, word_vectors = word
                vector += word_vectors[key].double() - _with_intercept(word_feature.double()) @ weights
            vectors[key] = (F.normalize(vector, dim=0) * self.norms[key]).float()
        return PredictedStart(vectors=vectors, unreliable_because=self._why_unreliable(feature))

    def _why_unreliable(self, feature: Tensor) -> str:
        for key, r_squared in self.r_squared.items():
            if r_squared <= 0:
                return f"words' vectors for {key} are predicted no better than by their mean (R2 {r_squared:.2f})"
        distance = float(1 - _cosines(feature[None], self.features).max())
        if distance > self.max_distance:
            return f"the photos lie {distance:.2f} from all that is known, usual is up to {self.max_distance:.2f}"
        return ""


def fit_start_regression(
    features: Tensor,
    vectors: Mapping[str, Tensor],
    drawn: Tensor,
    drawn_words: Sequence[int],
    photo_features: Tensor | None = None,
) -> StartRegression:
    """Fit the regression on words and, if there are any, on concepts learned before.

    features: [n, width] text features of the words.
    vectors: text encoder key -> [n + m, dim] vectors of the words, followed by those of the m concepts.
    drawn: [d, width] features of pictures of some of the words.
    drawn_words: [d] index of each drawn word in `features`.
    photo_features: [m, width] features of the concepts' photos.
    """
    chosen = torch.tensor(drawn_words)
    features = features.double()
    drawn = drawn.double()
    offsets = drawn - features[chosen]
    gap = offsets.mean(0)
    if photo_features is not None:
        features = torch.cat([features, photo_features.double() - gap])
    # each drawn word's feature is shifted by the mean offset of the others, so that its own is left out here, too
    probes = drawn - (offsets.sum(0) - offsets) / (len(drawn) - 1)
    cosines = _cosines(probes, features)
    cosines[torch.arange(len(probes)), chosen] = -1
    distances = 1 - cosines.max(1).values
    fits = {key: _fit_ridge(features, table.double(), probes, chosen) for key, table in vectors.items()}
    return StartRegression(
        features=features,
        modality_gap=gap,
        max_distance=float(distances.quantile(_DISTANCE_QUANTILE)),
        weights={key: weights for key, (weights, _) in fits.items()},
        norms={key: float(table.norm(dim=1).mean()) for key, table in vectors.items()},
        r_squared={key: r_squared for key, (_, r_squared) in fits.items()},
    )


def choose_words_to_draw(num_words: int) -> list[int]:
    """Return the indices of `NUM_DRAWN_WORDS` words spaced evenly over the list, or of all words if there are fewer."""
    count = min(NUM_DRAWN_WORDS, num_words)
    return [i * num_words // count for i in range(count)]


def draw_words(backbone: Backbone, words: Sequence[str], seed: int) -> list[Image.Image]:
    """Draw one picture of each word with the model."""
    requests = [ImageRequest(WORD_PROMPT.format(word), seed_for(seed, word, "amortise")) for word in words]
    return generate(backbone, requests, _SAMPLING)


def _fit_ridge(features: Tensor, vectors: Tensor, probes: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """Fit a ridge regression whose penalty is chosen by leave-one-out cross-validation.

    features: [n, width] and vectors: [n, dim] to fit on. probes: [d, width] features to predict the d `chosen` vectors
    from. Returns the weights [1 + width, dim] and the R squared of the predictions with each chosen row left out.
    """
    rows = _with_intercept(features)
    probe_rows = _with_intercept(probes)
    scale = float((features - features.mean(0)).square().sum(0).mean())
    truth = vectors[chosen]
    variance = (truth - vectors.mean(0)).square().sum()
    best = torch.empty(0), -float("inf")
    for ridge in _RIDGES:
        penalty = torch.full((rows.shape[1],), ridge * scale, dtype=torch.float64).index_fill(0, torch.tensor(0), 0.0)
        inverse = torch.linalg.inv(rows.T @ rows + penalty.diag())
        weights = inverse @ rows.T @ vectors
        # Leaving row i out takes inverse @ x_i * residual_i / (1 - leverage_i) from the weights (Sherman and Morrison)
        own = rows[chosen]
        residuals = truth - own @ weights
        leverages = (own @ inverse * own).sum(1)
        correction = (probe_rows @ inverse * own).sum(1) / (1 - leverages)
        left_out = probe_rows @ weights - correction[:, None] * residuals
        r_squared = float(1 - (truth - left_out).square().sum() / variance)
        if r_squared > best[1]:
            best = weights, r_squared
    return best


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def _with_intercept(features: Tensor) -> Tensor:
    """Prepend a 1 to each feature, for the intercept: [..., width] -> [..., 1 + width]."""
    return torch.cat([features.new_ones(*features.shape[:-1], 1), features], dim=-1)
