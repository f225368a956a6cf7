"""A U-Net whose gradients pass through its up path alone.

The down path and the middle run as under `torch.no_grad`: they keep nothing for the backward pass, and text states
reach the output's gradient only through the cross-attention of the up path.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def up_path_alone(unet: nn.Module) -> nn.Module:
    """Return a diffusers U-Net that computes the same and has gradients in its up path alone.

    Its blocks are those of `unet`, so weights, hooks, layout and gradient checkpointing are shared, also later ones.
    `unet` stays as it is, and both may run at a time in different threads.
    """
    twin = copy.copy(unet)
    twin._modules = dict(unet._modules)  # else shared: the assignments below would change `unet`
    twin.down_blocks = nn.ModuleList([_Constant(block) for block in unet.down_blocks])  # type: ignore[union-attr]
    if unet.mid_block is not None:
        twin.mid_block = _Constant(unet.mid_block)  # type: ignore[arg-type]
    return twin


class _Constant(nn.Module):
    """A block of a U-Net whose outputs have no gradient."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.has_cross_attention: bool = getattr(block, "has_cross_attention", False)
        """Answer to the U-Net, which asks its blocks what they take."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.block(*args, **kwargs)
