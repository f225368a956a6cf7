"""Build models of the families without a U-Net or without CLIP in the shapes of published ones, with random weights.

The configurations are those of `ldm-text2im-large-256`, `stable-diffusion-3.5-medium`, `stable-diffusion-3.5-large` and
`FLUX.1-dev`. Prompts are tokenized by the demo's tokenizer, with each text encoder's own length: an estimate of memory
depends on the number of ids and not on their values.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.random_model import TEXT, TEXT_G, VAE, default_dtype, demo_tokenizer, text_encoder
from textual_inversion.families.base import Backbone
from textual_inversion.families.flux import Flux
from textual_inversion.families.ldm import LatentDiffusion
from textual_inversion.families.sd3 import StableDiffusion3
from textual_inversion.text_encoders import CLIP_KEYS, T5_KEY, T5_LENGTH
from textual_inversion.tokenizer import Tokenizer
from textual_inversion.tokens import TokenTable
from textual_inversion.wordpiece import TEXT_ENCODER_KEY

_CLIP_LENGTH = 77
_T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
           "feed_forward_proj": "gated-gelu"}  # fmt: skip
_VAE_16 = {**VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
_MMDIT = {"sample_size": 128, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096,
          "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}  # fmt: skip
_SD35 = {
    "sd35-medium": {**_MMDIT, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
    "sd35-large": {**_MMDIT, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                   "pos_embed_max_size": 192},
}  # fmt: skip
_FLUX_LENGTH = 512
_EVEN_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

NAMES = ("ldm", *_SD35, "flux")


def backbone_of(name: str, dtype: torch.dtype) -> Backbone:
    """Make a model of one of `NAMES` on the CPU: the denoiser, the autoencoder and T5 in `dtype`, the other text
    encoders in float32, as they are loaded."""
    if name == "ldm":
        return _latent_diffusion(dtype)
    return _flux(dtype) if name == "flux" else _stable_diffusion_3(_SD35[name], dtype)


def _latent_diffusion(dtype: torch.dtype) -> LatentDiffusion:
    encoder: Any = LDMBertModel(LDMBertConfig())  # the defaults are the published model's
    table = TokenTable(encoder.model.embed_tokens.weight)
    encoder.model.embed_tokens = table
    with default_dtype(dtype):
        unet = UNet2DConditionModel(sample_size=32, cross_attention_dim=1280)
        vae = AutoencoderKL(latent_channels=4, sample_size=256, **VAE)
    return LatentDiffusion(
        key=TEXT_ENCODER_KEY,
        table=table,
        vocabulary=_vocabulary(_CLIP_LENGTH, encoder.config.vocab_size),
        text_encoder=encoder,
        unet=unet,
        vae=vae,
        scheduler_config={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        digest="random",
    )


def _stable_diffusion_3(transformer: dict[str, Any], dtype: torch.dtype) -> StableDiffusion3:
    clips = [text_encoder(CLIPTextModelWithProjection, config) for config in (TEXT, TEXT_G)]
    with default_dtype(dtype):
        t5 = T5EncoderModel(T5Config(**_T5_XXL))
        mmdit = SD3Transformer2DModel(**transformer)
        vae = AutoencoderKL(**_VAE_16)
    words = _vocabulary(_CLIP_LENGTH, TEXT["vocab_size"])
    return StableDiffusion3(
        text_encoders=dict(zip((*CLIP_KEYS, T5_KEY), (*clips, t5), strict=True)),
        vocabularies={**dict.fromkeys(CLIP_KEYS, words), T5_KEY: _vocabulary(T5_LENGTH, _T5_XXL["vocab_size"])},
        transformer=mmdit,
        vae=vae,
        scheduler_config={"shift": 3.0},
        digest="random",
    )


def _flux(dtype: torch.dtype) -> Flux:
    clip = text_encoder(CLIPTextModel, TEXT)
    with default_dtype(dtype):
        t5 = T5EncoderModel(T5Config(**_T5_XXL))
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # all else are the defaults of the class
        vae = AutoencoderKL(**_VAE_16)
    return Flux(
        clip=clip,
        t5=t5,
        vocabularies={
            CLIP_KEYS[0]: _vocabulary(_CLIP_LENGTH, TEXT["vocab_size"]),
            T5_KEY: _vocabulary(_FLUX_LENGTH, _T5_XXL["vocab_size"]),
        },
        transformer=transformer,
        vae=vae,
        resolution=1024,
        scheduler_config=_EVEN_SHIFT,
        digest="random",
    )


def _vocabulary(length: int, size: int) -> Tokenizer:
    return Tokenizer(demo_tokenizer(length), length, size)
