"""A tiny random FLUX.1 in the exact diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny_models import MAX_LENGTH, RESOLUTION, _fill, tiny_tokenizer
from tests.tiny_sd3 import tiny_t5_encoder, tiny_t5_tokenizer

WIDTHS = {"clip_l": 16, "t5xxl": 48}
LATENT_SHAPE = (4, 8, 8)
SHIFT, SCALE = 0.1159, 0.3611
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 8, "max_image_seq_len": 32}
"""Scheduler settings of FLUX.1 dev, with numbers of tokens that a tiny picture lies between."""


def tiny_flux(directory: Path | str, *, guidance: bool = True, seed: int = 0, **scheduler: Any) -> Path:
    """Save a random FluxPipeline like FLUX.1 dev, or without `guidance` like schnell; returns its directory.

    The CLIP's config has the legacy end-of-text id 2, which makes transformers pool at the largest id.
    """
    tokenizer = tiny_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTHS["clip_l"], intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=MAX_LENGTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip
    t5 = tiny_t5_encoder(WIDTHS["t5xxl"])
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_SHAPE[0], num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTHS["t5xxl"], pooled_projection_dim=WIDTHS["clip_l"],
        guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=RESOLUTION, block_out_channels=(8, 16, 16), latent_channels=LATENT_SHAPE[0], norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=SHIFT, scaling_factor=SCALE,
    )  # fmt: skip
    for offset, module in enumerate((clip, t5, transformer, vae)):
        _fill(module, seed * 4 + offset)
    settings = {**(DYNAMIC if guidance else {"shift": 1.0}), **scheduler}
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**settings), vae=vae, text_encoder=clip,
        tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(directory, safe_serialization=True)  # fmt: skip
    return Path(directory)
