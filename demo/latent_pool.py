"""Assemble the denoiser's training data: latents, captions, unnamed objects, and how often each scene is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from demo.pool import Pool, UnnamedPool
from demo.tokenizer import encode
from demo.unnamed import unnamed_tokenizer

SHARES = {"unnamed": 0.22, "plain": 0.32, "style": 0.25, "view": 0.09, "pair": 0.12}
"""Kind of scene -> share of the denoiser's samples. Objects in the plain look are what names and learned words need
most; a style that is a filter needs few scenes of each object."""


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Training data of the denoiser."""

    latents: Tensor
    """Scaled latents, fp16 (scene, channels, 8, 8)."""
    input_ids: Tensor
    """Token ids of the captions, int64 (scene, token)."""
    objects: Tensor
    """Row of `features` that the caption's unnamed word is made from, -1 for a caption without one, int64 (scene,)."""
    features: Tensor
    """Features of unnamed objects (`unnamed.picture_features`), fp32 (object, features)."""
    cumulative: np.ndarray
    """Cumulative probability of the scenes, float64 (scene,)."""

    def sample(self, count: int, rng: np.random.Generator) -> Tensor:
        """Draw scenes by their probability, int64 (count,)."""
        return torch.from_numpy(np.searchsorted(self.cumulative, rng.random(count), side="right"))


def kind_of(attributes: Sequence[str], names: Sequence[str]) -> str:
    """Return the kind of a named scene, a key of `SHARES`."""
    style, views = attributes[0], attributes[4]
    if len(names) > 1:
        return "pair"
    if views:
        return "view"
    return "plain" if style == "plain" else "style"


def cumulative_probability(kinds: Sequence[str]) -> np.ndarray:
    """Return the cumulative probability of scenes that share each kind's part of `SHARES` evenly, float64 (scene,).

    The shares of kinds that no scene has go to the others in proportion.
    """
    values, inverse, counts = np.unique(np.asarray(kinds), return_inverse=True, return_counts=True)
    probability = np.asarray([SHARES[kind] for kind in values]) / counts
    cumulative = probability[inverse].cumsum()
    return cumulative / cumulative[-1]


def assemble(
    pool: Pool, means: Tensor, unnamed: UnnamedPool, unnamed_means: Tensor, features: Tensor, tokenizer: CLIPTokenizer
) -> LatentPool:
    """Put named and unnamed scenes together.

    `means` and `unnamed_means`: posterior means of the scenes, already in the denoiser's units. `features`: one row for
    each object of `unnamed`. Captions are tokenized with the unnamed word beside the vocabulary of `tokenizer`.
    """
    kinds = [kind_of(attributes, names) for attributes, names in zip(pool.attributes, pool.names, strict=True)]
    nobody = torch.full((len(pool.captions),), -1)
    return LatentPool(
        latents=torch.cat([means, unnamed_means]).half(),
        input_ids=encode(unnamed_tokenizer(tokenizer), [*pool.captions, *unnamed.captions]),
        objects=torch.cat([nobody, torch.from_numpy(unnamed.objects)]),
        features=features,
        cumulative=cumulative_probability([*kinds, *["unnamed"] * len(unnamed.captions)]),
    )
