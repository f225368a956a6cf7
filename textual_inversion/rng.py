"""Randomness belongs to the concept: every draw is seeded by what it is for, never by when or where it happens."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(run_seed: int, concept_id: str, purpose: str, step: int = 0) -> int:
    """A 63-bit seed from a BLAKE2b digest; `hash()` would differ between processes."""
    name = f"{run_seed}\x1f{concept_id}\x1f{purpose}\x1f{step}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def generator_for(run_seed: int, concept_id: str, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one concept at one step: its draws do not depend on the device."""
    import torch  # seeds alone are wanted where torch is not: it takes a second

    return torch.Generator().manual_seed(seed_for(run_seed, concept_id, purpose, step))
