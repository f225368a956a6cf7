"""What an actor finds out about its device at its start: how many concepts to take, and how to run the denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import RunConfig
from textual_inversion.compile_trial import Pass, compile_checked, compile_fastest
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import guidance_scale
from textual_inversion.training_data import ImageFeatures
from textual_inversion.trial import choose_slots, samples_per_second

_CPU_SAMPLES = 8
_GPU_SLOTS = 16
_GPU_SHARE = 0.7


def default_slots(backbone: Backbone, config: InversionConfig, image_features: ImageFeatures | None) -> int:
    """Concepts learned side by side when the configuration leaves it open.

    On a GPU, found by trying, with room left in its memory for drawing beside. On a CPU the same on every machine, as
    results are promised to be: enough for a batch of 8 samples. (Its cores are busy from about there on, and more slots
    make a short run's last concepts wait for copies of each other.)
    """
    if backbone.device.type != "cuda":
        return max(1, _CPU_SAMPLES // config.batch_size)

    def rate(slots: int) -> float:
        free_bytes, _ = torch.cuda.mem_get_info(backbone.device)
        before = torch.cuda.memory_allocated(backbone.device)
        torch.cuda.reset_peak_memory_stats(backbone.device)
        found = samples_per_second(backbone, config, slots, image_features)
        if torch.cuda.max_memory_allocated(backbone.device) - before > _GPU_SHARE * free_bytes:
            raise torch.OutOfMemoryError(f"{slots} slots leave too little room for drawing")
        return found

    slots = choose_slots(rate, _GPU_SLOTS)
    torch.cuda.empty_cache()
    return slots


def compile_where_wanted(backbone: Backbone, config: RunConfig, passes: Sequence[Pass]) -> None:
    """As `actors.compile` says; `passes`: all kinds that will come, the one that most time goes to first. Raises
    RuntimeError where it says `on` or `graphs` and that cannot be done."""
    wanted = config.actors.compile
    if wanted == "auto" and backbone.device.type == "cuda":
        compile_fastest(backbone, passes)
    elif wanted in ("on", "graphs"):
        compile_checked(backbone, passes, graphs=wanted == "graphs")


def passes_to_learn(backbone: Backbone, config: RunConfig, slots: int) -> list[Pass]:
    """Of an actor that learns so many concepts at a time, draws their sample pictures, and may look how they do."""
    size = config.inversion.batch_size
    passes = [Pass(slots * size, gradients=True), drawing_pass(backbone, config.grid.sampling)]
    return [*passes, Pass(size, gradients=False)] if config.inversion.stop.needs_eval else passes


def drawing_pass(backbone: Backbone, config: SamplingConfig) -> Pass:
    guided = guidance_scale(backbone, config) > 1
    return Pass((1 + guided) * config.batch_size, gradients=False)
