"""Local editing: redraw the masked part of a picture after a prompt and keep the rest.

Blended Latent Diffusion (Avrahami, Fried & Lischinski 2023, algorithm 1), in which Gal et al. 2022 use learned words
without any change to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from textual_inversion.augment import to_pixels, to_weights
from textual_inversion.config import SamplingConfig
from textual_inversion.config_checks import require
from textual_inversion.families.base import Backbone
from textual_inversion.generate import (
    EncodedRequest,
    Guidance,
    ImageRequest,
    batches,
    check_guided,
    denoise,
    encode_request,
    initial_noises,
    pad,
    to_pictures,
    with_own_defaults,
)
from textual_inversion.prompt_encoder import PromptEncoder


def edit(
    backbone: Backbone,
    picture: Image.Image,
    mask: Image.Image,
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    *,
    strength: float = 1.0,
    keep_pixels: bool = True,
) -> list[Image.Image]:
    """Draw the picture once for each request, redrawn where the mask is white.

    `picture`: RGB, `mask`: grey, both of the model's resolution. `strength`: share of the sampling steps that the
    redrawn part goes through; below 1, something of the old content stays. `keep_pixels`: outside the mask, take the
    picture's own pixels and not the autoencoder's reconstruction of them.

    With an all-black mask and without `keep_pixels`, the result is the autoencoder's reconstruction, to the bit. Raises
    ValueError for other sizes and for bad requests.
    """
    require(0 < strength <= 1, "strength", strength, "above 0 and at most 1")
    side = backbone.resolution
    for name, given in (("picture", picture), ("mask", mask)):
        if given.size != (side, side):
            raise ValueError(
                f"the {name} is {given.width} x {given.height} px but the model draws {side} x {side}; crop picture "
                f"and mask to the same square and scale both to {side} x {side}"
            )
    mask = mask.convert("L")
    for request in requests:
        check_guided(backbone, request, config)
    encoded = [encode_request(backbone, request) for request in requests]
    encoder = PromptEncoder(backbone, shares_passes=config.batch_size > 1)
    source = encode_picture(backbone, picture)
    region = latent_mask(mask, backbone)
    drawn = [
        one
        for batch in batches(encoded, config.batch_size)
        for one in _edit_batch(encoder, source, region, batch, config, strength)
    ]
    return [Image.composite(one, picture.convert("RGB"), mask) for one in drawn] if keep_pixels else drawn


def encode_picture(backbone: Backbone, picture: Image.Image) -> Tensor:
    """Encode a picture as z_init, the mean of the autoencoder's distribution, [1, *latent_shape]."""
    pixels = to_pixels(picture.convert("RGB"))[None]
    return backbone.encode_images(pixels.to(backbone.device))[:, 0]


def latent_mask(mask: Image.Image, backbone: Backbone) -> Tensor:
    """Scale a mask to the latents' size, [1, 1, height, width] bool: true where any pixel of the cell is more white
    than black.

    The paper's code takes one pixel of each cell, which loses lines thinner than a cell; the paper dilates the mask
    instead.
    """
    weights = to_weights(mask.convert("L"))[None].to(backbone.device)
    return F.adaptive_max_pool2d(weights, backbone.latent_shape[1:]) >= 0.5


def _edit_batch(
    encoder: PromptEncoder,
    source: Tensor,
    region: Tensor,
    requests: Sequence[EncodedRequest],
    config: SamplingConfig,
    strength: float,
) -> list[Image.Image]:
    """Run algorithm 1 for one batch: z_k ~ noise(z_init, k); after each step, z_t = z_fg m + z_bg (1 - m)."""
    backbone = encoder.backbone
    config = with_own_defaults(config, backbone)
    padded = pad(requests, config.batch_size)
    noise = initial_noises(backbone, padded)
    source = source.expand_as(noise)
    run = backbone.noise.begin(config.solver, config.steps)
    first = len(run.timesteps) - max(1, round(strength * config.steps))

    def blend(foreground: Tensor, step: int) -> Tensor:
        # A step leads to the noise level of the *next* one, which the background must have: with its own, as in the
        # authors' code, the background would lag a step behind and stay noisy at the end. One draw of noise serves all
        # steps, so that a deterministic sampler would follow the same path.
        return torch.where(region, foreground, run.noised(source, noise, step + 1))

    with torch.no_grad():
        latents = run.noised(source, noise, first)
        guidance = Guidance.from_requests(encoder, padded, config)
        latents = denoise(backbone, latents, guidance, run, first, blend)
        return to_pictures(backbone.decode(latents)[: len(requests)])
