"""Numbers that show how an actor works, for monitoring."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """Numbers of an actor at one moment."""

    steps: int
    """Optimizer steps of all its concepts since it started."""
    slots: int
    """Concepts that it can learn at a time."""
    slots_used: int
    """Concepts that it learns now."""
    losses: list[float]
    """Last loss read of each concept in a slot."""
    device_bytes: int
    """GPU memory that torch holds; 0 on a CPU."""
    host_bytes: int
    """Largest main memory that the process has held."""


def held_bytes(device: torch.device) -> tuple[int, int]:
    """Return `device_bytes` and `host_bytes` of this process."""
    kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage
    on_device = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
