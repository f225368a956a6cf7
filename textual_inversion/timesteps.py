"""Which timesteps a step trains at, and how much each sample's loss weighs."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(batch_size: int, num_train_timesteps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t ~ U{0, ..., T-1}, every sample weighing the same (Gal et al. 2022, Eq. 1) -> (t [batch], weight [batch])."""
    return torch.randint(num_train_timesteps, (batch_size,), generator=generator), torch.ones(batch_size)
