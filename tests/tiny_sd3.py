"""A tiny random Stable Diffusion 3 in the exact diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny_models import MAX_LENGTH, NOUNS, RESOLUTION, _fill, tiny_tokenizer
from textual_inversion.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES

WIDTHS = {"clip_l": 16, "clip_g": 24, "t5xxl": 48}
LATENT_SHAPE = (16, 8, 8)
VOCAB_SIZE_T5 = 256
"""More than the tokenizer's ids, as in T5."""


def tiny_stable_diffusion_3(directory: Path | str, *, t5: bool = True, seed: int = 0, **scheduler: Any) -> Path:
    """Save a random StableDiffusion3Pipeline, with or without T5; returns its directory.

    The second tokenizer pads with "!", and the first text encoder's config has the legacy end-of-text id 2, which
    makes transformers pool at the largest id.
    """
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(first), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=MAX_LENGTH, projection_dim=width,
                bos_token_id=first.bos_token_id, eos_token_id=end, pad_token_id=1,
            )
        )
        for width, end in ((WIDTHS["clip_l"], 2), (WIDTHS["clip_g"], first.eos_token_id))
    ]  # fmt: skip
    last = tiny_t5_encoder(WIDTHS["t5xxl"])
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTHS["t5xxl"], caption_projection_dim=16,
        pooled_projection_dim=WIDTHS["clip_l"] + WIDTHS["clip_g"], pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=RESOLUTION, block_out_channels=(8, 16, 16), latent_channels=16, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
    )  # fmt: skip
    for offset, module in enumerate((*clips, last, transformer, vae)):
        _fill(module, seed * 5 + offset)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}), vae=vae,
        text_encoder=clips[0], tokenizer=first, text_encoder_2=clips[1], tokenizer_2=second,
        text_encoder_3=last if t5 else None, tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    ).save_pretrained(directory, safe_serialization=True)  # fmt: skip
    return Path(directory)


def tiny_t5_encoder(width: int) -> T5EncoderModel:
    """Make a T5 of one layer."""
    return T5EncoderModel(
        T5Config(vocab_size=VOCAB_SIZE_T5, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                 feed_forward_proj="gated-gelu")
    )  # fmt: skip


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Make a T5 tokenizer in which every word of the templates but "photo" is one token; it spells out other words."""
    templates = " ".join(OBJECT_TEMPLATES + STYLE_TEMPLATES).replace("{}", "")
    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    words = sorted({*templates.split(), *NOUNS} - {"photo"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(letter, -4.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
