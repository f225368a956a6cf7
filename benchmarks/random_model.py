"""Build models with random weights in the shapes of real models: as much to compute, nothing to download."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from benchmarks.restatement import CommonAlgorithm
from pipeline.inputs.models import locate
from textual_inversion.families.base import stack_prompts
from textual_inversion.families.sd import StableDiffusion
from textual_inversion.prompts import encode_prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """Configurations of the three networks, where they differ from their classes' defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]


# fmt: skip below: a table reads better with one network in two lines than with one value on each line
SHAPES = {
    "sd15": Shape(
        unet={"sample_size": 64, "cross_attention_dim": 768},  # all else are the defaults of the class
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
             "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
        text={"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
              "num_attention_heads": 12, "max_position_embeddings": 77},
    ),
    "small": Shape(
        unet={"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 32), "layers_per_block": 1,
              "norm_num_groups": 8, "attention_head_dim": 2,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        vae={"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        text={"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 24},
    ),
}  # fmt: skip


class Parts:
    """Networks of a random model of one shape, shared by all measured algorithms, so that the common algorithm has the
    memory layout of convolutions that a backbone sets."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.unet = UNet2DConditionModel(**shape.unet).to(dtype)
            self.vae = AutoencoderKL(latent_channels=4, **shape.vae).to(dtype)
            last = shape.text["vocab_size"] - 1
            self._text_encoder = CLIPTextModel(
                CLIPTextConfig(bos_token_id=last - 1, eos_token_id=last, pad_token_id=last, **shape.text)
            )
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self._length = shape.text["max_position_embeddings"]

    def tokenizer(self) -> Any:
        """Load the demo's tokenizer, whose vocabulary is smaller than any shape's, with this shape's length."""
        return CLIPTokenizerFast.from_pretrained(f"{locate('demo/model')}/tokenizer", model_max_length=self._length)

    def backbone(self, mode: str = "eager", compiler: str = "inductor") -> StableDiffusion:
        """Make a backbone with a copy of the text encoder, because a backbone replaces its token table."""
        backbone = StableDiffusion(
            tokenizer=self.tokenizer(),
            text_encoder=copy.deepcopy(self._text_encoder),
            unet=self.unet,
            vae=self.vae,
            scheduler_config=self.scheduler.config,
            digest="random",
        )
        if mode != "eager":
            backbone.compile(backend=compiler, graphs=mode == "graphs")
        return backbone

    def common(self, batch_size: int) -> CommonAlgorithm:
        return CommonAlgorithm(
            tokenizer=self.tokenizer(),
            text_encoder=copy.deepcopy(self._text_encoder),
            unet=self.unet,
            vae=self.vae,
            scheduler=self.scheduler,
            learning_rate=5e-3,
            batch_size=batch_size,
        )

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())


def count_flops(shape: str, device: str = "meta") -> float:
    """Count the FLOPs of one sample-step, from the prompt to the row's gradient; on `meta` nothing is computed.

    Attention is spelled out in matrix products while counting: torch counts only some fused kernels, and these repeat
    work in the backward pass.
    """
    backbone = Parts(SHAPES[shape], device, torch.float32).backbone()
    row = torch.zeros(1, next(iter(backbone.token_tables.values())).dim, device=backbone.device, requires_grad=True)
    prompt = stack_prompts([encode_prompt("<c>", {"<c>": [0]}, backbone.vocabularies)])
    ids = {key: each.to(backbone.device) for key, each in prompt.items()}
    latents = torch.randn(1, *backbone.latent_shape, device=backbone.device)
    timesteps = torch.tensor([500], device=backbone.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        conditioning = backbone.encode_prompts(ids, {"clip_l": row})
        loss = backbone.predict(latents, timesteps, conditioning).square().mean()
        torch.autograd.grad(loss, row)
    return float(counter.get_total_flops())
