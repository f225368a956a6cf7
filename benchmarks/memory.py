"""Estimate the memory of learning and drawing with models of real shapes, without their weights and without a GPU.

    python -m benchmarks.memory
    python -m benchmarks.memory --models sd15 --batch-size 2

Networks are made of tensors that have a shape and no data, in bfloat16 beside float32 text encoders, as an actor on a
GPU loads them. Their passes are estimated as an actor does at its start (`textual_inversion/memory_estimate.py`):
weights, what a sample keeps for the backward pass (text encoders included), the peak of a pass of one concept and what
each further concept adds; then a batch of pictures, whole and with the autoencoder on one after the other.
`benchmarks.gpu` compares such an estimate with the peak that a GPU measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from benchmarks.random_model import SHAPES
from benchmarks.timing import heading, say, table, table_line
from pipeline.inputs.models import locate
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.families.sd import StableDiffusion
from textual_inversion.families.sdxl import StableDiffusionXL
from textual_inversion.memory_estimate import PassMemory, draw_made_up, learn_made_up, trace
from textual_inversion.text_encoders import CLIP_KEYS
from textual_inversion.tokenizer import Tokenizer

TITLES = [
    "",
    "GB of weights",
    "GB kept of a sample",
    "GB of a pass of one concept",
    "GB of each further one",
    "GB of a batch of pictures",
    "GB of it in slices",
]

SCHEDULER = {"_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

TEXT = SHAPES["sd15"].text

TEXT_G = {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
"""The larger text encoder of Stable Diffusion XL."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in this precision within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def text_encoder(cls: Any, shape: dict[str, Any]) -> Any:
    last = shape["vocab_size"] - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return cls(CLIPTextConfig(**shape, **ends, projection_dim=shape["hidden_size"]))


def networks(unet: dict[str, Any]) -> dict[str, Any]:
    """Return a U-Net of this shape, and Stable Diffusion's autoencoder for its pictures."""
    with default_dtype(torch.bfloat16):
        vae = {**SHAPES["sd15"].vae, "sample_size": 8 * unet["sample_size"]}
        return {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(latent_channels=4, **vae)}


def tokenizer() -> Any:
    """Load the demo's tokenizer, whose vocabulary is smaller, for prompts of Stable Diffusion's length."""
    length = TEXT["max_position_embeddings"]
    return CLIPTokenizerFast.from_pretrained(f"{locate('demo/model')}/tokenizer", model_max_length=length)


def stable_diffusion() -> Backbone:
    """Make Stable Diffusion 1.5."""
    return StableDiffusion(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(CLIPTextModel, TEXT),
        scheduler_config=SCHEDULER,
        digest="none",
        **networks(SHAPES["sd15"].unet),
    )


def stable_diffusion_xl() -> Backbone:
    """Make Stable Diffusion XL."""
    vocabulary = Tokenizer(tokenizer(), TEXT["max_position_embeddings"], TEXT["vocab_size"])
    encoders = [text_encoder(CLIPTextModel, TEXT), text_encoder(CLIPTextModelWithProjection, TEXT_G)]
    return StableDiffusionXL(
        text_encoders=dict(zip(CLIP_KEYS, encoders, strict=True)),
        vocabularies=dict.fromkeys(CLIP_KEYS, vocabulary),
        scheduler_config=SCHEDULER,
        guides_by_zeros=True,
        digest="none",
        **networks(UNET_XL),
    )


MODELS: dict[str, Callable[[], Backbone]] = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl}


def main(arguments: list[str] | None = None) -> int:
    """Print the table, row by row."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    facts = {
        "a_pass_of_one_concept": f"{options.batch_size} samples",
        "a_batch_of_pictures": f"{options.pictures}, with guidance",
    }
    say(heading("Estimated memory", "benchmarks.memory", arguments, **facts))
    say(table(TITLES, []))
    for name in options.models:
        for row in rows(name, options.batch_size, options.pictures):
            say(table_line(row))
    return 0


def rows(name: str, batch_size: int, pictures: int) -> Iterator[Sequence[object]]:
    """Yield a model's rows: without gradient checkpointing, and with it."""
    mode = FakeTensorMode()
    with mode:
        backbone = MODELS[name]()
    config = InversionConfig(batch_size=batch_size)
    sampling = SamplingConfig(batch_size=pictures)

    def estimate(work: Callable[[], object], **saving: bool) -> PassMemory:
        backbone.save_memory(MemorySaving(**saving))
        return trace(work, mode)

    drawn = [estimate(partial(draw_made_up, backbone, sampling), slices=slices).peak for slices in (False, True)]
    for checkpoints in (False, True):
        one, two = (
            estimate(partial(learn_made_up, backbone, config, slots), checkpoints_gradients=checkpoints)
            for slots in (1, 2)
        )
        sizes = [one.weights, one.kept / batch_size, one.peak, two.peak - one.peak, *drawn]
        label = f"{name} at {backbone.resolution} px, {'with' if checkpoints else 'without'} checkpointing"
        yield [label, *(size / 1e9 for size in sizes)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=4, help="samples a step and concept")
    parser.add_argument("--pictures", type=int, default=16, help="in a batch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
