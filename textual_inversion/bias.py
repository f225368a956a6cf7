"""Bias of a word in a model, as the proportions of captions that its pictures are nearest to, and how the proportions
change when the word is learned anew.

Gal et al. 2022, section 4.5: the bias of a word is reduced by learning a new word from a small diverse set. A frozen
feature extractor assigns each drawn picture to the nearest of several captions; the functions here turn the
assignments into proportions with confidence intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proportion:
    """A count among n pictures, with a 95 % confidence interval. Raises ValueError unless 0 <= count <= n, n >= 1."""

    count: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n or self.n < 1:
            raise ValueError(f"{self.count} of {self.n} pictures is not a proportion")

    @property
    def value(self) -> float:
        """The proportion itself, count / n, in [0, 1]."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927), (low, high): stays within [0, 1] and has positive width at 0 and at n."""
        z2 = Z_95 * Z_95
        centre = (self.count + z2 / 2) / (self.n + z2)
        half = Z_95 / (self.n + z2) * sqrt(self.count * (self.n - self.count) / self.n + z2 / 4)
        return max(0.0, centre - half), min(1.0, centre + half)


def difference(before: Proportion, after: Proportion) -> tuple[float, float, float]:
    """Newcombe 1998, method 10: return after - before and its 95 % interval (low, high), from the two Wilson intervals.

    The method takes the pictures for independent. Pictures drawn from the same seeds are more alike, if anything, and
    the interval is then too wide.
    """
    change = after.value - before.value
    (after_low, after_high), (before_low, before_high) = after.interval, before.interval
    down = sqrt((after.value - after_low) ** 2 + (before_high - before.value) ** 2)
    up = sqrt((after_high - after.value) ** 2 + (before.value - before_low) ** 2)
    return change, change - down, change + up


def nearest_caption_proportions(images: Tensor, texts: Tensor) -> list[Proportion]:
    """Return, for each caption, the proportion of pictures whose nearest caption it is by cosine.

    images: [n, dim] features of pictures; texts: [k, dim] features of captions. Raises ValueError for fewer than two
    captions, among which there is nothing to choose, or for no pictures.
    """
    if len(texts) < 2 or not len(images):
        raise ValueError(f"{len(images)} pictures and {len(texts)} captions; give at least one and two")
    nearest = (F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T).argmax(1)
    counts = torch.bincount(nearest, minlength=len(texts)).tolist()
    return [Proportion(count=count, n=len(images)) for count in counts]
