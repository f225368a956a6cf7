"""How an actor does, for whoever watches it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """An actor at one moment."""

    steps: int
    """Optimizer steps since it started, of all its concepts."""
    slots: int
    slots_used: int
    losses: list[float]
    """The last loss read of each concept in a slot."""
    device_bytes: int
    """That torch holds of its GPU's memory; 0 on a CPU."""
    host_bytes: int
    """The most main memory it has held."""


def held_bytes(device: torch.device) -> tuple[int, int]:
    """`device_bytes` and `host_bytes` of this process."""
    kilobyte = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    on_device = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
