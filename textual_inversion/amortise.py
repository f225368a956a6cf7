"""A start read off the photos: a ridge regression from image features to embedding vectors, fitted on the words that
the model knows, and on concepts learned before. A concept with an initializer starts at its vector, moved by what the
regression makes of the difference between the photos and the word; without one, at what it makes of the photos.

Words cost little to fit on: a CLIP's features of the text "a photo of a WORD" stand for pictures of it. Features of
texts and of pictures lie apart, though, by much the same offset everywhere (Liang et al. 2022, "modality gap"); a few
words are therefore drawn by the model, which gives the offset, and a check by cross-validation: how well the vector of
a drawn word is predicted by a regression that was not shown the word.
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
NUM_DRAWN = 64
"""Words drawn for the offset and the check."""
_SAMPLING = SamplingConfig(steps=10, guidance_scale=3.0)
_RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Times the sum of squared features per dimension; the one that cross-validation finds best is taken."""
_USUAL_SHARE = 0.95
"""Of the drawn words, that lie no farther from all other words than is still taken for usual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the regression says about a concept."""

    vectors: Mapping[str, Tensor]
    """Text encoder key -> [dim] float32, of the known vectors' mean norm (a regression alone would shrink it)."""
    doubt: str
    """Why it should not be used; empty if it may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amortiser:
    """A fitted regression; build it with `fit`. Feature matrices are float64."""

    features: Tensor
    """[n, width] unit-norm, of everything it was fitted on."""
    gap: Tensor
    """[width] what features of pictures have over those of texts."""
    max_distance: float
    """1 - cosine to the nearest feature, as far as usual."""
    weights: Mapping[str, Tensor]
    """Text encoder key -> [1 + width, dim], the intercept first."""
    norms: Mapping[str, float]
    explained: Mapping[str, float]
    """Text encoder key -> share of the drawn words' variance that is explained when each is left out (R squared)."""

    def predict(self, feature: Tensor, word: tuple[Tensor, Mapping[str, Tensor]] | None = None) -> Prediction:
        """`feature`: [width] of a concept's photos. `word`: [width] of its initializer's text, and the initializer's
        vectors, text encoder key -> [dim]."""
        feature = feature.double() - self.gap
        vectors = {}
        for key, weights in self.weights.items():
            vector = _with_one(feature) @ weights
            if word is not None:
                vector += word[1][key].double() - _with_one(word[0].double()) @ weights
            vectors[key] = (F.normalize(vector, dim=0) * self.norms[key]).float()
        return Prediction(vectors=vectors, doubt=self._doubt(feature))

    def _doubt(self, feature: Tensor) -> str:
        for key, explained in self.explained.items():
            if explained <= 0:
                return f"words' vectors for {key} are predicted no better than by their mean (R2 {explained:.2f})"
        distance = float(1 - _cosines(feature[None], self.features).max())
        if distance > self.max_distance:
            return f"the photos lie {distance:.2f} from all that is known, usual is up to {self.max_distance:.2f}"
        return ""


def fit(
    features: Tensor, vectors: Mapping[str, Tensor], drawn: Tensor, words: Sequence[int], learned: Tensor | None = None
) -> Amortiser:
    """Fit on features [n, width] and their vectors, text encoder key -> [n, dim].

    features: of texts, and behind them, if any, of concepts' photos: as many as `learned`.
    drawn: [m, width] features of pictures of some of the words, and `words` says of which rows.
    """
    chosen = torch.tensor(words)
    features, drawn = features.double(), drawn.double()
    offsets = drawn - features[chosen]
    gap = offsets.mean(0)
    if learned is not None:
        features = torch.cat([features, learned.double() - gap])
    # a drawn word must not see its own offset either
    seen = drawn - (offsets.sum(0) - offsets) / (len(drawn) - 1)
    others = _cosines(seen, features)
    others[torch.arange(len(seen)), chosen] = -1
    distances = 1 - others.max(1).values
    fits = {key: _ridge(features, table.double(), seen, chosen) for key, table in vectors.items()}
    return Amortiser(
        features=features,
        gap=gap,
        max_distance=float(distances.quantile(_USUAL_SHARE)),
        weights={key: weights for key, (weights, _) in fits.items()},
        norms={key: float(table.norm(dim=1).mean()) for key, table in vectors.items()},
        explained={key: explained for key, (_, explained) in fits.items()},
    )


def spread(num_words: int) -> list[int]:
    """Which words to draw: `NUM_DRAWN` of them, or all, evenly over the list."""
    count = min(NUM_DRAWN, num_words)
    return [i * num_words // count for i in range(count)]


def draw_words(backbone: Backbone, words: Sequence[str], seed: int) -> list[Image.Image]:
    """A picture of each word, as the model draws it."""
    requests = [ImageRequest(WORD_PROMPT.format(word), seed_for(seed, word, "amortise")) for word in words]
    return generate(backbone, requests, _SAMPLING)


def _ridge(features: Tensor, table: Tensor, seen: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """The weights [1 + width, dim] with the ridge that predicts the chosen rows best from `seen` when each is left out,
    and the share of their variance explained then."""
    rows, probes = _with_one(features), _with_one(seen)
    scale = float((features - features.mean(0)).square().sum(0).mean())
    truth = table[chosen]
    total = (truth - table.mean(0)).square().sum()
    best = torch.empty(0), -float("inf")
    for ridge in _RIDGES:
        penalty = torch.full((rows.shape[1],), ridge * scale, dtype=torch.float64).index_fill(0, torch.tensor(0), 0.0)
        inverse = torch.linalg.inv(rows.T @ rows + penalty.diag())
        weights = inverse @ rows.T @ table
        # Leaving row i out takes inverse @ x_i * residual_i / (1 - leverage_i) from the weights (Sherman and Morrison)
        own = rows[chosen]
        residuals = truth - own @ weights
        leverages = (own @ inverse * own).sum(1)
        correction = (probes @ inverse * own).sum(1) / (1 - leverages)
        left_out = probes @ weights - correction[:, None] * residuals
        explained = float(1 - (truth - left_out).square().sum() / total)
        if explained > best[1]:
            best = weights, explained
    return best


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def _with_one(features: Tensor) -> Tensor:
    """A 1 in front of each, for the intercept."""
    return torch.cat([features.new_ones(*features.shape[:-1], 1), features], dim=-1)
