"""Build models with random weights in the shapes of real models: as much to compute, nothing to download."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from benchmarks.restatement import CommonAlgorithm
from pipeline.inputs.models import locate
from textual_inversion.families.base import stack_prompts
from textual_inversion.families.sd import StableDiffusion
from textual_inversion.families.sdxl import StableDiffusionXL
from textual_inversion.families.unet import UNetBackbone
from textual_inversion.prompts import encode_prompt
from textual_inversion.text_encoders import CLIP_KEYS
from textual_inversion.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Configurations of the networks, where they differ from their classes' defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any] | None = None
    """Configuration of the second text encoder, which makes a model a Stable Diffusion XL."""


# fmt: skip below: a table reads better with one network in two lines than with one value on each line
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
TEXT = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "max_position_embeddings": 77}  # fmt: skip
TEXT_G = {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_SMALL = Shape(
    unet={"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 32), "layers_per_block": 1,
          "norm_num_groups": 8, "attention_head_dim": 2,
          "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    vae={"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    text={"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "max_position_embeddings": 24},
)  # fmt: skip

SHAPES = {
    "sd15": Shape(
        unet={"sample_size": 64, "cross_attention_dim": 768},  # all else are the defaults of the class
        vae={**VAE, "sample_size": 512},
        text=TEXT,
    ),
    "sdxl": Shape(
        unet={"sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
              "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
              "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
              "projection_class_embeddings_input_dim": 2816},
        vae={**VAE, "sample_size": 1024},
        text=TEXT,
        text_2=TEXT_G,
    ),
    "small": _SMALL,
    "small-xl": Shape(
        unet={**_SMALL.unet, "cross_attention_dim": 64, "addition_embed_type": "text_time",
              "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8},
        vae=_SMALL.vae,
        text=_SMALL.text,
        text_2=_SMALL.text,
    ),
}  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in this precision within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Parts:
    """Networks of a random model of one shape, shared by all measured algorithms, so that the common algorithm has the
    memory layout of convolutions that a backbone sets. A compiled backbone has a U-Net of its own."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device), default_dtype(dtype):
            self.unet = UNet2DConditionModel(**shape.unet)
            self.vae = AutoencoderKL(latent_channels=4, **shape.vae)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self._device = device
        self._text = shape.text
        self._texts: list[tuple[type, dict[str, Any]]] = [(CLIPTextModel, shape.text)]
        if shape.text_2:
            self._texts.append((CLIPTextModelWithProjection, shape.text_2))
        self._states = [encoder.state_dict() for encoder in self._new_text_encoders()]

    def _new_text_encoders(self) -> list[Any]:
        with torch.device(self._device):
            return [text_encoder(cls, config) for cls, config in self._texts]

    def text_encoders(self) -> list[Any]:
        """Return copies of the text encoders: tensors without data, which `copy.deepcopy` cannot copy, included."""
        encoders = self._new_text_encoders()
        for encoder, state in zip(encoders, self._states, strict=True):
            encoder.load_state_dict(state)
        return encoders

    def tokenizer(self) -> Any:
        """Load the demo's tokenizer with this shape's length."""
        return demo_tokenizer(self._text["max_position_embeddings"])

    def backbone(self, mode: str = "eager", compiler: str = "inductor") -> UNetBackbone:
        """Make a backbone with copies of the text encoders, because a backbone replaces their token tables."""
        encoders = self.text_encoders()
        # a compiled U-Net may have another memory layout, in which the others would be slower
        unet = self.unet if mode == "eager" else copy.deepcopy(self.unet)
        shared: dict[str, Any] = {
            "unet": unet, "vae": self.vae, "scheduler_config": self.scheduler.config, "digest": "random"
        }  # fmt: skip
        backbone: UNetBackbone
        if len(encoders) == 1:
            backbone = StableDiffusion(tokenizer=self.tokenizer(), text_encoder=encoders[0], **shared)
        else:
            words = Tokenizer(self.tokenizer(), self._text["max_position_embeddings"], self._text["vocab_size"])
            backbone = StableDiffusionXL(
                text_encoders=dict(zip(CLIP_KEYS, encoders, strict=True)),
                vocabularies=dict.fromkeys(CLIP_KEYS, words),
                guides_by_zeros=True,
                **shared,
            )
        if mode != "eager":
            backbone.compile(backend=compiler, graphs=mode == "graphs")
        return backbone

    def common(self, batch_size: int) -> CommonAlgorithm | None:
        """Make the common algorithm with a copy of the text encoder; None for models with two, which it cannot
        train."""
        if len(self._texts) > 1:
            return None
        return CommonAlgorithm(
            tokenizer=self.tokenizer(),
            text_encoder=self.text_encoders()[0],
            unet=self.unet,
            vae=self.vae,
            scheduler=self.scheduler,
            learning_rate=5e-3,
            batch_size=batch_size,
        )

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())


def demo_tokenizer(length: int) -> Any:
    """Load the demo's tokenizer, whose vocabulary is smaller than any shape's, with another length of prompts."""
    return CLIPTokenizerFast.from_pretrained(f"{locate('demo/model')}/tokenizer", model_max_length=length)


def text_encoder(cls: Any, config: dict[str, Any]) -> Any:
    """Make a text encoder of transformers, whose last ids begin and end a text."""
    last = config["vocab_size"] - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return cls(CLIPTextConfig(**config, **ends, projection_dim=config["hidden_size"]))


def count_flops(shape: str, device: str = "meta") -> float:
    """Count the FLOPs of one sample-step, from the prompt to the rows' gradients; on `meta` nothing is computed.

    Attention is spelled out in matrix products while counting: torch counts only some fused kernels, and these repeat
    work in the backward pass.
    """
    backbone = Parts(SHAPES[shape], device, torch.float32).backbone()
    rows = {
        key: torch.zeros(1, table.dim, device=backbone.device, requires_grad=True)
        for key, table in backbone.token_tables.items()
    }
    prompt = stack_prompts([encode_prompt("<c>", {"<c>": [0]}, backbone.vocabularies)])
    ids = {key: each.to(backbone.device) for key, each in prompt.items()}
    latents = torch.randn(1, *backbone.latent_shape, device=backbone.device)
    timesteps = torch.tensor([500], device=backbone.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        conditioning = backbone.encode_prompts(ids, rows)
        loss = backbone.predict(latents, timesteps, conditioning).square().mean()
        torch.autograd.grad(loss, [*rows.values()])
    return float(counter.get_total_flops())
