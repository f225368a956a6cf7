"""Random rows are mixtures of words, the same ones in every table."""

from __future__ import annotations

import numpy as np
import torch

from demo.mixtures import Mixtures, mix, unname
from demo.unnamed import UNNAMED


def test_a_mixture_is_a_sum_of_distances_to_the_mean_word() -> None:
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])  # the mean word is (1, 1)
    mixtures = Mixtures(torch.tensor([[1, 2, 0]]), torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.0, 0.25]]))
    torch.testing.assert_close(mixtures.rows(table), torch.tensor([[2.0, 1.25]]))


def test_the_first_word_of_a_mixture_leads() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    mixtures = mix(2000, table, torch.Generator().manual_seed(1))
    assert mixtures.words.shape == mixtures.weights.shape == (2000, 3)
    assert mixtures.weights.mean(0)[0] > 0.4
    assert mixtures.weights.mean(0)[1:].abs().max() < 0.05
    assert abs(mixtures.noise.std() / table.std() - 0.1) < 0.01


def test_the_unnamed_word_replaces_a_name_or_precedes_it() -> None:
    rng = np.random.default_rng(0)
    texts = {unname("a photo of an owl and a cat", ("owl", "cat"), rng) for _ in range(100)}
    assert texts == {
        f"a photo of a {UNNAMED} and a cat",
        f"a photo of a {UNNAMED} owl and a cat",
        f"a photo of an owl and a {UNNAMED}",
        f"a photo of an owl and a {UNNAMED} cat",
    }
