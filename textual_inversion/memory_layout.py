"""Memory layout of the convolutions of a frozen network on an accelerator.

CUDA's convolutions are fastest on tensors whose channels lie side by side (channels-last). But an operation may return
its result in another layout; then the next convolution first copies it, forward and backward. In a U-Net a GroupNorm
stands before almost every convolution, and many versions of torch have no GroupNorm that keeps the layout
(https://github.com/pytorch/pytorch/issues/111824). torch.compile makes its own, which does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHANNELS, _GROUPS, _SIDE = 64, 32, 8


def convolution_layout(device: torch.device, dtype: torch.dtype, *, is_compiled: bool) -> torch.memory_format:
    """Return the layout for a network on this device, which is tried there; on a CPU the usual one, as its convolutions
    choose their own."""
    if device.type != "cuda" or not (is_compiled or keeps_channels_last(device, dtype)):
        return torch.contiguous_format
    return torch.channels_last


def lay_out(network: Any, layout: torch.memory_format) -> None:
    """Give a network's convolutions this layout. One that has it is left alone: tensors without data, on which memory
    is estimated, cannot be replaced."""
    if any(each.dim() == 4 and not each.is_contiguous(memory_format=layout) for each in network.parameters()):
        network.to(memory_format=layout)


def keeps_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GroupNorm on this device returns tensors in channels-last, given such."""
    given = torch.zeros(2, _CHANNELS, _SIDE, _SIDE, device=device, dtype=dtype)
    normed = F.group_norm(given.to(memory_format=torch.channels_last), _GROUPS)
    return normed.is_contiguous(memory_format=torch.channels_last)
