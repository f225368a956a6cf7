"""Seeds of random numbers. A seed depends on the run, the concept, the purpose and the step, and on nothing else, so
that a concept draws the same numbers whenever and wherever it is learned."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(run_seed: int, concept_id: str, purpose: str, step: int = 0) -> int:
    """Return a 63-bit seed, taken from a BLAKE2b digest; `hash()` would differ between processes."""
    name = f"{run_seed}\x1f{concept_id}\x1f{purpose}\x1f{step}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def generator_for(run_seed: int, concept_id: str, purpose: str, step: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose of one concept at one step: its draws do not depend on the device."""
    import torch  # imported late: callers of `seed_for` alone do not load torch, which takes a second

    return torch.Generator().manual_seed(seed_for(run_seed, concept_id, purpose, step))
