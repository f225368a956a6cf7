"""What a word stands for in a model, as shares of answers, and how that changes when the word is learned anew.

Gal et al. 2022, section 4.5: a word's bias is reduced by learning a new word from a small diverse set. A judge model
gives each drawn picture to one of several captions; the functions here turn answers into shares with intervals.
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
class Share:
    """So many of n pictures; with a 95 % interval."""

    count: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n or self.n < 1:
            raise ValueError(f"{self.count} of {self.n} pictures is not a share")

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927), which stays in [0, 1] and is not empty at 0 or n."""
        z2 = Z_95 * Z_95
        centre = (self.count + z2 / 2) / (self.n + z2)
        half = Z_95 / (self.n + z2) * sqrt(self.count * (self.n - self.count) / self.n + z2 / 4)
        return max(0.0, centre - half), min(1.0, centre + half)


def change(before: Share, after: Share) -> tuple[float, float, float]:
    """after - before, and its 95 % interval (Newcombe 1998, method 10: from the two Wilson intervals). The pictures
    count as independent; drawn from the same seeds they are if anything more alike, and the interval too wide."""
    difference = after.value - before.value
    (low_a, high_a), (low_b, high_b) = after.interval, before.interval
    down = sqrt((after.value - low_a) ** 2 + (high_b - before.value) ** 2)
    up = sqrt((high_a - after.value) ** 2 + (before.value - low_b) ** 2)
    return difference, difference - down, difference + up


def shares(images: Tensor, texts: Tensor) -> list[Share]:
    """For each of [k, dim] caption features, the share of [n, dim] picture features that are nearest to it (cosine).

    Raises ValueError for fewer than two captions, among which there is nothing to choose, or for no pictures.
    """
    if len(texts) < 2 or not len(images):
        raise ValueError(f"{len(images)} pictures and {len(texts)} captions; give at least one and two")
    nearest = (F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T).argmax(1)
    counts = torch.bincount(nearest, minlength=len(texts)).tolist()
    return [Share(count=count, n=len(images)) for count in counts]
