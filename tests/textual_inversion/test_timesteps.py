from __future__ import annotations

import torch

from textual_inversion.timesteps import uniform


def test_uniform_covers_every_timestep_alike() -> None:
    t, weight = uniform(50_000, 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=10)
    assert counts.shape == (10,)
    assert (counts - 5000).abs().max() < 5 * 5000**0.5
    assert torch.equal(weight, torch.ones(50_000))


def test_draws_belong_to_the_generator() -> None:
    first, _ = uniform(8, 1000, torch.Generator().manual_seed(3))
    again, _ = uniform(8, 1000, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
