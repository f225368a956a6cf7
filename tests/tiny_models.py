"""Tiny random models in the exact diffusers layout, built from configs: the same bytes from the same seed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from textual_inversion.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES

RESOLUTION = 32
LATENT_SHAPE = (4, 8, 8)
MAX_LENGTH = 24
DIM = 32
NOUNS = ("cat", "dog", "toy", "tree", "clock", "statue", "beach", "snow", "moon", "art", "red", "blue")
"""Words besides the templates' own that are one token each."""
EXTRACTOR_PX = 32
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": EXTRACTOR_PX, "patch_size": 8}


def tiny_stable_diffusion(directory: Path | str, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a random StableDiffusionPipeline of some 400 thousand weights; returns its directory."""
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=MAX_LENGTH, projection_dim=DIM,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=2, cross_attention_dim=DIM,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=RESOLUTION, block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    for offset, module in enumerate((text_encoder, unet, vae)):
        _fill(module, seed * 3 + offset)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(directory, safe_serialization=True)  # fmt: skip
    return Path(directory)


def tiny_latent_diffusion(directory: Path | str, autoencoder: str = "vq", seed: int = 0) -> Path:
    """Save a random LDMTextToImagePipeline with a "vq" or "kl" autoencoder, whose pictures have the sides of
    `tiny_stable_diffusion`'s; returns its directory."""
    tokenizer = tiny_wordpiece()
    text_encoder = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer), d_model=DIM, encoder_layers=2, encoder_ffn_dim=2 * DIM,
            encoder_attention_heads=2, head_dim=8,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=2, cross_attention_dim=DIM,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    blocks: dict[str, Any] = {  # the pipeline takes it that latents have an eighth of the picture's sides
        "block_out_channels": (8, 8, 16, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": RESOLUTION,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    vae = VQModel(num_vq_embeddings=64, **blocks) if autoencoder == "vq" else AutoencoderKL(**blocks)
    for offset, module in enumerate((text_encoder, unet, vae)):
        _fill(module, seed * 3 + offset)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )  # as in ldm-text2im-large-256: the first timestep is 0
    LDMTextToImagePipeline(
        vqvae=vae, bert=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
    ).save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_extractor(kind: str, directory: Path, seed: int = 0) -> Path:
    """Save a random model of one of the kinds that `extractors` knows; returns its directory."""
    tokenizer = tiny_tokenizer()
    text = {**_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 20,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    t: Any = transformers
    model = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=_VISION)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**_VISION), add_pooling_layer=False),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**_VISION)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_VISION)),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
    }[kind]()
    _fill(model, seed)
    model.save_pretrained(directory)
    if kind in ("clip", "siglip"):
        tokenizer.save_pretrained(directory)
    return directory


def tiny_tokenizer() -> CLIPTokenizer:
    """Make a CLIP tokenizer in which every word of the templates is a token, and that spells out any other text."""
    templates = " ".join(OBJECT_TEMPLATES + STYLE_TEMPLATES).replace("{}", "").replace("-", " ")
    merges = _merges(sorted({*templates.split(), *NOUNS}))
    letters = [chr(c) for c in _byte_letters()]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token="<|endoftext|>")


def tiny_wordpiece() -> BertTokenizer:
    """Make a BERT tokenizer in which every word of the templates is a token, and that spells out other words of
    letters a-z."""
    templates = " ".join(OBJECT_TEMPLATES + STYLE_TEMPLATES).replace("{}", "").replace("-", " ")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = sorted({*templates.split(), *NOUNS} - set(letters))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"!',-.:<>*", *letters, *(f"##{each}" for each in letters)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens + words)}, do_lower_case=True)


def _byte_letters() -> list[int]:
    """Return the 256 characters that byte-level BPE writes bytes as (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [256 + i for i in range(256 - len(printable))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent first, until every word is one token; ties go by spelling."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in split):
        counts = Counter(pair for word in split for pair in pairwise(word))
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = ["".join(pair)]
                i += 1
    return merges


def _fill(module: nn.Module, seed: int) -> None:
    """Fill weights at random in the order of their names, so that golden numbers do not depend on a library's
    initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.named_parameters()):
        draw = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = draw / math.sqrt(weight[0].numel())
        else:  # a bias, or the scale of a norm
            weight.data = 0.1 * draw + (1 if name.endswith("weight") else 0)
