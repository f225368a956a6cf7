"""A tiny random Stable Diffusion XL in the exact diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_models import MAX_LENGTH, RESOLUTION, _fill, tiny_tokenizer

WIDTHS = {"clip_l": 16, "clip_g": 24}
POOLED = 20
LATENT_SHAPE = (4, 8, 8)


def tiny_stable_diffusion_xl(
    directory: Path | str, *, seed: int = 0, zeros: bool = True, force_upcast: bool = True, **scheduler: Any
) -> Path:
    """Save a random StableDiffusionXLPipeline; returns its directory.

    As in the published checkpoints, the second tokenizer pads with "!", both text encoders' configs have the legacy
    end-of-text id 2, which makes transformers pool at the largest id, and states and picture sizes reach the U-Net.
    `zeros`: the pipeline's `force_zeros_for_empty_prompt`. `force_upcast`: false for an autoencoder that was mended for
    float16.
    """
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    encoders = [
        cls(
            CLIPTextConfig(
                vocab_size=len(first), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                num_attention_heads=2, max_position_embeddings=MAX_LENGTH, projection_dim=POOLED,
                bos_token_id=first.bos_token_id, eos_token_id=2, pad_token_id=1,
            )
        )
        for width, cls in zip(WIDTHS.values(), (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
    ]  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=(2, 2), cross_attention_dim=sum(WIDTHS.values()),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + POOLED,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=RESOLUTION, block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.13025, force_upcast=force_upcast,
    )  # fmt: skip
    for offset, module in enumerate((*encoders, unet, vae)):
        _fill(module, seed * 4 + offset)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", **scheduler}  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=first, tokenizer_2=second, unet=unet,
        scheduler=DDIMScheduler(**settings), force_zeros_for_empty_prompt=zeros,
    ).save_pretrained(directory, safe_serialization=True)  # fmt: skip
    return Path(directory)
