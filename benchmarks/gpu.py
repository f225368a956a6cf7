"""How much of an accelerator the engine uses: random weights of Stable Diffusion 1.5's shape, nothing to download.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --shape small --device cpu --slots 1,2

For each number of slots, eager and compiled (the U-Net by torch.compile): sample-steps a second, model-FLOP utilisation
and memory, beside the common algorithm (`benchmarks/restatement.py`) on the same weights. Model FLOPs are those of one
sample's forward pass and of the backward pass through its activations, counted on the model; what is computed twice to
save memory does not count. Memory is the peak above the weights. Concepts an hour are calculated: encoding a concept's
photos, 475 steps of 2 samples at this rate, and its sample grid, in turn.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from benchmarks.restatement import CommonAlgorithm
from benchmarks.timing import Spread, alternate, heading, number, say, table
from pipeline.config import GridConfig
from pipeline.models import locate
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families.sd import StableDiffusion
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.latents import Views, encode_views

BUDGET_SAMPLES = 475 * 2
"""Of one concept (Voronov et al. 2023: the mean number of steps until DVAR stops, in batches of 2)."""

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bfloat16, SXM boards; by a part of the device's name."""

PHOTOS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Configurations of the three networks, where they differ from their classes' defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]


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
        text={"vocab_size": 1400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 24},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one repetition."""

    rate: float
    """Sample-steps a second."""
    memory_gb: float | None
    """Peak above what was there before; None on a CPU."""


class Parts:
    """A random model of a shape, shared by all that is measured: the layout that a backbone gives its convolutions, the
    common algorithm has, too."""

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
        """The demo's, whose vocabulary is the smaller one, with this shape's length."""
        return CLIPTokenizerFast.from_pretrained(f"{locate('demo/model')}/tokenizer", model_max_length=self._length)

    def backbone(self, compile_with: str = "") -> StableDiffusion:
        """With a text encoder of its own, as its vocabulary is replaced; the U-Net compiled by this backend, if any."""
        backbone = StableDiffusion(
            tokenizer=self.tokenizer(), text_encoder=copy.deepcopy(self._text_encoder), unet=self.unet, vae=self.vae,
            scheduler_config=self.scheduler.config, digest="random",
        )  # fmt: skip
        if compile_with:
            backbone.compile(backend=compile_with)
        return backbone

    def common(self, batch_size: int) -> CommonAlgorithm:
        return CommonAlgorithm(
            tokenizer=self.tokenizer(), text_encoder=copy.deepcopy(self._text_encoder), unet=self.unet, vae=self.vae,
            scheduler=self.scheduler, learning_rate=5e-3, batch_size=batch_size,
        )  # fmt: skip

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    parts = Parts(SHAPES[options.shape], options.device, dtype)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    backbones = {name: parts.backbone("" if name == "eager" else options.backend) for name in options.modes.split(",")}
    backbone = next(iter(backbones.values()))
    tflop = count_flops(options.shape) / 1e12
    peak = options.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in device), 0.0)
    once, grid = seconds_once(backbone, options.device), seconds_of_grid(backbone, options.repetitions)
    facts = {
        "device": device,
        "model": f"{options.shape}, U-Net of {parts.parameters() / 1e6:,.1f} M, {dtype}, {backbone.resolution} px",
        "samples": f"{options.batch_size} a step and concept",
        "repetitions": f"{options.repetitions} of {options.steps} steps",
        "model_GFLOP_a_sample_step": f"{number(1000 * tflop)}; peak {number(peak) if peak else 'unknown'} TFLOP/s",
        "a_concept's_photos_encoded": f"{number(once)} s",
        "a_concept's_sample_grid": f"{number(grid)} s",
    }
    say(heading("Use of an accelerator", "benchmarks.gpu", arguments, **facts))
    works = {"common algorithm": Attempt(partial(time_common, parts.common(options.batch_size), options))}
    for slots in options.slots:
        for mode, each in backbones.items():
            works[f"{slots} slots, {mode}"] = Attempt(partial(time_engine, each, options, slots))
    found = alternate(works, options.repetitions)
    rows = list(rows_of(found, lambda rate: 3600 / (once + BUDGET_SAMPLES / rate + grid), tflop, peak))
    titles = ["", "sample-steps/s", "times the common algorithm", "MFU %", "GB above weights", "concepts/h"]
    say(table(titles, rows))
    return 0


def rows_of(
    found: dict[str, list[Figures | None]], hourly: Callable[[float], float], tflop: float, peak: float
) -> Iterator[list[object]]:
    """Of the table; the first work is what the others are compared with. `hourly`: rate -> concepts an hour."""
    first = None
    for name, repetitions in found.items():
        fitting = [figures for figures in repetitions if figures]
        if not fitting:
            yield [name, "out of memory", *[None] * 4]
            continue
        rate = Spread.of([figures.rate for figures in fitting])
        first = first or rate.median
        memory = max((figures.memory_gb for figures in fitting if figures.memory_gb), default=None)
        used = 100 * rate.median * tflop / peak if peak else None
        yield [name, rate, rate.median / first, used, memory, hourly(rate.median)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", default="sd15", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--slots", type=numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,N")
    parser.add_argument("--modes", default="eager,compiled", help="eager, compiled or both, with a comma between")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    parser.add_argument("--batch-size", type=int, default=2, help="samples a step and concept")
    parser.add_argument("--steps", type=int, default=20, help="a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of a device that is not in the table")
    options = parser.parse_args(arguments)
    if unknown := set(options.modes.split(",")) - {"eager", "compiled"}:
        parser.error(f"--modes {options.modes}: no mode {', '.join(sorted(unknown))}; there are eager and compiled")
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


class Attempt:
    """A work that may not fit the device's memory: then None, and it is not tried again."""

    def __init__(self, work: Callable[[], Figures]) -> None:
        self._work, self._fits = work, True

    def __call__(self) -> Figures | None:
        if not self._fits:
            return None
        try:
            return self._work()
        except torch.OutOfMemoryError:
            self._fits = False
        torch.cuda.empty_cache()  # once the error, and with it the stack that holds tensors, is gone
        return None


def time_common(common: CommonAlgorithm, options: argparse.Namespace) -> Figures:
    common.begin(a_concept(0), photos(SHAPES[options.shape].vae["sample_size"]))
    return timed(lambda: common.learn(options.steps), options.steps * options.batch_size, options.device)


def time_engine(backbone: StableDiffusion, options: argparse.Namespace, slots: int) -> Figures:
    """All slots full for all steps."""
    config = InversionConfig(steps=options.steps, batch_size=options.batch_size)
    views = encode(backbone)
    waiting = [Assignment(a_concept(number), views) for number in range(slots)]
    engine = Engine(backbone, config, slots=slots, seed=0)

    def end(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")

    def run() -> None:
        engine.run(lambda _wait: waiting.pop() if waiting else None, end)

    return timed(run, options.steps * options.batch_size * slots, options.device)


def timed(work: Callable[[], object], samples: int, device: str) -> Figures:
    """From an idle device to an idle device."""
    if device == "cpu":
        began = time.perf_counter()
        work()
        return Figures(samples / (time.perf_counter() - began), None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return Figures(samples / seconds, (torch.cuda.max_memory_allocated() - before) / 1e9)


def a_concept(number: int) -> Concept:
    return Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=("x",), initializer="cat")


def photos(side: int) -> list[Image.Image]:
    """Noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTOS, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def encode(backbone: StableDiffusion) -> Views:
    """A concept's photos."""
    return encode_views(backbone, photos(backbone.resolution), InversionConfig().augment, "any", 0)


def count_flops(shape: str, device: str = "meta") -> float:
    """Of one sample-step, from the prompt to the row's gradient; on `meta` nothing is computed. Attention is spelt out
    while counting: fused kernels are counted only where torch knows them, and repeat work in the backward pass."""
    backbone = Parts(SHAPES[shape], device, torch.float32).backbone()
    row = torch.zeros(1, next(iter(backbone.token_tables.values())).dim, device=backbone.device, requires_grad=True)
    ids = torch.tensor([backbone.assemble([backbone.vocab_size])], device=backbone.device)
    latents = torch.randn(1, *backbone.latent_shape, device=backbone.device)
    timesteps = torch.tensor([500], device=backbone.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        conditioning = backbone.encode_prompts(ids, {"clip_l": row})
        loss = backbone.predict(latents, timesteps, conditioning).square().mean()
        torch.autograd.grad(loss, row)
    return float(counter.get_total_flops())


def seconds_once(backbone: StableDiffusion, device: str) -> float:
    """To encode a concept's photos."""
    return median(PHOTOS / timed(lambda: encode(backbone), PHOTOS, device).rate for _ in range(3))


def seconds_of_grid(backbone: StableDiffusion, repetitions: int) -> float:
    """To draw a concept's sample pictures, the initializer's own among them, as an actor does."""
    grid = GridConfig()
    row = torch.zeros(1, next(iter(backbone.token_tables.values())).dim)
    embedding = LearnedEmbedding(placeholder_token="<c0>", vectors={"clip_l": row})
    count = len(grid.prompts) * grid.images_per_prompt
    requests = [ImageRequest("a photo of a <c0>", seed, (embedding,)) for seed in range(count)]
    requests += [ImageRequest("a photo of a cat", seed) for seed in range(count)]
    sampling = SamplingConfig(batch_size=len(requests))
    seconds = []
    for _ in range(repetitions + 1):  # the first is not counted
        began = time.perf_counter()
        generate(backbone, requests, sampling)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
