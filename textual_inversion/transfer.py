"""From the host to the accelerator without waiting for it: in a step, the host only says what is to be done."""

from __future__ import annotations

import torch
from torch import Tensor


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, on the device; one that is there already stays as it is. It lies in page-locked memory
    meanwhile: CUDA copies from other memory only after all that the device still has to do."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)
