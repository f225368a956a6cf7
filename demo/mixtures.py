"""Mix words of a vocabulary into rows that no word has: learned words are such rows.

A model that is distilled from another one on the vocabulary alone would copy it at the words and not between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.unnamed import UNNAMED

_WORDS_PER_ROW = 3
_ROW_NOISE = 0.1
"""Deviation of the noise on a random row's coordinates, relative to the vocabulary's."""
_CLASS_NOUN_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Mixtures:
    """Random rows for the unnamed word: a word's row, moved some way towards a random mixture of words."""

    words: Tensor
    """Words of each mixture, as indices into the common words, int64 [mixtures, 3]."""
    weights: Tensor
    """Weights of their distances to the mean word, fp32 [mixtures, 3]."""
    noise: Tensor
    """Noise on the row, fp32 [mixtures, width]."""

    def rows(self, table: Tensor) -> Tensor:
        """Return the mixtures of the common words' rows in one token table, [mixtures, width]."""
        centre = table.mean(0)
        return centre + torch.einsum("mw,mwd->md", self.weights, table[self.words] - centre) + self.noise


def mix(count: int, table: Tensor, generator: torch.Generator) -> Mixtures:
    """Draw `count` mixtures of common words, whose rows in one token table are [words, width]."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    words = torch.randint(len(table), (count, _WORDS_PER_ROW), **options)
    share = torch.rand(count, **options)
    weights = torch.randn(count, _WORDS_PER_ROW, **options) * (1 - share)[:, None]
    weights[:, 0] += share
    noise = torch.randn(count, table.shape[1], **options) * _ROW_NOISE * table.std()
    return Mixtures(words, weights, noise)


def unname(text: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """Put the unnamed word in place of one of the names in a caption, or before it."""
    name = names[rng.integers(len(names))]
    noun = f"{UNNAMED} {name}" if rng.random() < _CLASS_NOUN_SHARE else UNNAMED
    return text.replace(f"an {name}", f"a {name}").replace(name, noun, 1)
