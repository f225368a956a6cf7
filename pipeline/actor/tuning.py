"""What an actor finds out about its device at its start: how many concepts to take, and how to run the denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import RunConfig
from pipeline.ledger.records import Equality
from textual_inversion.batch_invariance import choose_sampling, choose_slots_per_pass
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


class PassSharing:
    """What may share a pass on an actor's device, so that a concept's bytes are those it has alone."""

    def __init__(self, backbone: Backbone, config: RunConfig, image_features: ImageFeatures | None) -> None:
        """`image_features`: as the engine's. The checks are of the denoiser as it runs when they are made, so it is to
        be compiled before."""
        self._backbone = backbone
        self._config = config
        self._image_features = image_features
        self._is_learning_exact = True
        self._is_drawing_exact = True

    def choose_slots_per_pass(self, slots: int) -> int:
        """Check passes of `slots` concepts and return how many may share one. Raises torch.OutOfMemoryError if they do
        not fit in the device's memory."""
        chosen, self._is_learning_exact = choose_slots_per_pass(
            self._backbone, self._config.inversion, slots, self._image_features
        )
        return chosen

    def choose_sampling(self) -> SamplingConfig:
        """Check the batches of sample pictures and return the settings to draw them with."""
        configured = self._config.grid.sampling
        try:
            chosen, self._is_drawing_exact = choose_sampling(self._backbone, configured, self._config.inversion.adapter)
        except torch.OutOfMemoryError:  # pictures are drawn later, when there may be memory again
            torch.cuda.empty_cache()
            self._is_drawing_exact = False
            return configured
        return chosen

    @property
    def equality(self) -> Equality:
        """Extent to which results equal those of the same concept alone, or elsewhere on the same kind of machine."""
        return "" if self._is_learning_exact and self._is_drawing_exact else "to rounding"
