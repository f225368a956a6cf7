"""The text-to-image latent diffusion model of Rombach et al. 2022, on which Gal et al. 2022 invert: a text encoder with
BERT's vocabulary, a U-Net, and an autoencoder of the KL or VQ kind.

The family serves any directory of diffusers' `LDMTextToImagePipeline`, such as CompVis' ldm-text2im-large-256 saved as
safetensors. That pipeline pads prompts to 77 ids and gives its text encoder no attention mask: every position, padding
included, sees every other. So a `causal` adapter (TextBoost v2) changes the states before the placeholder, too, by what
they see of the changed ones; prompts that do not name the concept stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import Tensor

from textual_inversion import model_files
from textual_inversion.families.parts import (
    device_named,
    dtype_named,
    read_autoencoder,
    read_component,
    read_text_encoder,
    scheduler_config,
)
from textual_inversion.families.unet import OneEncoderBackbone
from textual_inversion.model_checks import component_class
from textual_inversion.tokens import TokenTable
from textual_inversion.wordpiece import TEXT_ENCODER_KEY, load_vocabularies

_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class LatentDiffusion(OneEncoderBackbone):
    """A frozen BERT latent diffusion model as a `Backbone`; build it with `load`."""

    def _states(self, ids: Tensor) -> Tensor:
        """Return the states after the final norm, without an attention mask."""
        states: Tensor = self._text_encoder(ids, return_dict=True).last_hidden_state
        return states

    def _moments(self, encoded: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of what the autoencoder's `encode` returned, float32.

        A VQ model's latents are those before quantisation, as the denoiser was trained on them (Rombach et al. 2022,
        section 3.1); they have no deviation. `decode` quantises.
        """
        if hasattr(encoded, "latent_dist"):
            return super()._moments(encoded)
        latents = encoded.latents.float()
        return latents, torch.zeros_like(latents)


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> LatentDiffusion:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The text encoder's weights are always float32, as the rows are. The autoencoder has the denoiser's precision, except
    that it is float32 beside a float16 denoiser.
    """
    torch_device = device_named(device)
    dtype = dtype_named(precision, torch_device)
    modules = _load_modules(files, dtype)
    text_encoder, unet, vae = (module.to(torch_device) for module in modules)
    table = TokenTable(text_encoder.model.embed_tokens.weight)
    text_encoder.model.embed_tokens = table
    return LatentDiffusion(
        key=TEXT_ENCODER_KEY,
        table=table,
        vocabulary=load_vocabularies(files.directory)[TEXT_ENCODER_KEY],
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        scheduler_config=scheduler_config(files.directory),
        digest=files.digest(),
    )


def _load_modules(files: model_files.ModelFiles, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load text encoder, U-Net and autoencoder on the CPU. Raises ValueError if one lacks weights or has unknown
    ones."""
    text_encoder = read_text_encoder(files, "bert", LDMBertModel, torch.float32)
    unet = read_component(files, "unet", UNet2DConditionModel, torch_dtype=dtype)
    autoencoder = _AUTOENCODERS[component_class(files.directory, "vqvae")]
    return text_encoder, unet, read_autoencoder(files, "vqvae", autoencoder, dtype)
