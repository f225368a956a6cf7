"""Copies between the host and the accelerator that do not make the host wait: in a step it only queues work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting; return a tensor that is already there as it is.

    The host's copy goes through page-locked memory: CUDA copies from other memory only after all work queued so far.
    """
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def start_readback(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a device tensor to the host; return a function that waits for the copy and returns it.

    The function waits for the work that was queued before this call, not for work queued after it.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return on_host

    return wait
