"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a U-Net and a KL autoencoder (Rombach et al. 2022).

The family serves any diffusers `StableDiffusionPipeline` directory, epsilon or v-prediction. SD2 conditions on the
next-to-last layer of its text encoder by a config with one layer less, so SD2 needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from textual_inversion import model_files
from textual_inversion.families.parts import (
    UNUSED_CLIP_PARTS,
    device_named,
    dtype_named,
    read_autoencoder,
    read_component,
    read_text_encoder,
    replaced_table,
)
from textual_inversion.families.unet import OneEncoderBackbone
from textual_inversion.tokenizer import TEXT_ENCODER_KEY, Tokenizer, read_tokenizer

_CORRECTED = {"steps_offset": 1}
"""Scheduler setting that StableDiffusionPipeline corrects in old checkpoints, besides clipping, which `noise` never
does: the last timestep of a sampling run is not 0."""


class StableDiffusion(OneEncoderBackbone):
    """A frozen Stable Diffusion checkpoint as a `Backbone`; build it with `load`."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        digest: str,
    ) -> None:
        """Take over the modules, which come on their device and in their precision; replace the text encoder's
        vocabulary by a token table."""
        table = replaced_table(text_encoder)
        positions = text_encoder.config.max_position_embeddings
        super().__init__(
            key=TEXT_ENCODER_KEY,
            table=table,
            vocabulary=Tokenizer(tokenizer, positions, table.vocab_size),
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            scheduler_config={**scheduler_config, **_CORRECTED},
            digest=digest,
        )

    def _states(self, ids: Tensor) -> Tensor:
        """Return the last states. The pooled output, which some configs take at the largest id and so at a learned row,
        is not used by this family."""
        states: Tensor = self._text_encoder(ids).last_hidden_state
        return states


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> StableDiffusion:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The text encoder's weights are always float32, as the rows are. The autoencoder has the denoiser's precision, except
    that it is float32 beside a float16 denoiser.
    """
    torch_device = device_named(device)
    directory = str(files.directory)
    modules = load_modules(files, dtype_named(precision, torch_device))
    return StableDiffusion(
        tokenizer=read_tokenizer(directory),
        scheduler_config=DDPMScheduler.load_config(directory, subfolder="scheduler", local_files_only=True),
        digest=files.digest(),
        **{name: module.to(torch_device) for name, module in modules.items()},
    )


def load_modules(files: model_files.ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Load "text_encoder", "unet" and "vae" (by these names of diffusers' pipeline) on the CPU, for a denoiser of this
    precision. Raises ValueError if a checkpoint lacks weights or has unknown ones."""
    text_encoder = read_text_encoder(files, "text_encoder", CLIPTextModel, torch.float32, unused=UNUSED_CLIP_PARTS)
    # torch_dtype and not dtype, which diffusers takes only from 0.42 on
    unet = read_component(files, "unet", UNet2DConditionModel, torch_dtype=dtype)
    vae = read_autoencoder(files, "vae", AutoencoderKL, dtype)
    return {"text_encoder": text_encoder, "unet": unet, "vae": vae}
