"""U-Nets that share the blocks of another one: with gradients in the up path alone, and without the up path."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def up_path_alone(unet: nn.Module) -> nn.Module:
    """Return a diffusers U-Net that computes the same and has gradients in its up path alone.

    The down path and the middle run as under `torch.no_grad`: they keep nothing for the backward pass, and text states
    reach the output's gradient only through the cross-attention of the up path.
    """
    down = nn.ModuleList([_Constant(block) for block in unet.down_blocks])  # type: ignore[union-attr]
    middle = unet.mid_block
    return _sharing(unet, down_blocks=down, mid_block=None if middle is None else _Constant(middle))  # type: ignore[arg-type]


def down_path_alone(unet: nn.Module) -> nn.Module:
    """Return a diffusers U-Net whose output is that of the middle block, [batch, channels, height, width].

    An encoder of concepts may read it: Gal et al. 2023 ("Encoder-based Domain Tuning", arXiv 2302.12228, section 4.1)
    give theirs the features of the frozen U-Net's down path besides those of an image network.
    """
    return _sharing(unet, up_blocks=nn.ModuleList(), conv_norm_out=None, conv_out=nn.Identity())


def _sharing(unet: nn.Module, **others: nn.Module | None) -> nn.Module:
    """Return a U-Net with these blocks in place of its own.

    All others are those of `unet`, so weights, hooks, layout and gradient checkpointing are shared, also later ones.
    `unet` stays as it is, and both may run at a time in different threads.
    """
    twin = copy.copy(unet)
    twin._modules = unet._modules | others  # a dictionary of its own
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
