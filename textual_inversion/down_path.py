"""A U-Net that ends after its middle block, whose features an encoder of concepts may read.

Gal et al. 2023 ("Encoder-based Domain Tuning", arXiv 2302.12228, section 4.1) give their encoder the features of the
frozen U-Net's down path besides those of an image network.
"""

from __future__ import annotations

import copy

from torch import nn


def down_path_alone(unet: nn.Module) -> nn.Module:
    """Return a diffusers U-Net whose output is that of the middle block, [batch, channels, height, width].

    Its blocks are those of `unet`, so weights, hooks and layout are shared, also later ones. `unet` stays as it is, and
    both may run at a time in different threads.
    """
    twin = copy.copy(unet)
    twin._modules = dict(unet._modules)  # else shared: the next line would change `unet`
    twin._modules |= {"up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    return twin
