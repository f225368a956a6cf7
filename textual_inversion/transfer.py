"""Between the host and the accelerator without waiting for it: in a step, the host only says what is to be done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, on the device; one that is there already stays as it is. It lies in page-locked memory
    meanwhile: CUDA copies from other memory only after all that the device still has to do."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor of the device's to the host. Call what is returned to have it there: that waits for what
    the device had to do before, not for anything that it was told since."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return on_host

    return wait
