"""Fit an actor to its device: how many concepts to take, how to run the denoiser, and what may share a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.actor.compile_cache import file_name, kept_compilations
from pipeline.actor.memory_plan import LEARNING_SHARE, MemoryPlan, add_checkpointing, fit_learning
from pipeline.actor.pass_estimates import PassEstimates
from pipeline.config import RunConfig
from pipeline.ledger.records import Equality
from pipeline.store.errors import describe_error
from textual_inversion.adapter_config import CROSS_ATTENTION
from textual_inversion.batch_invariance import choose_sampling, choose_slots_per_pass
from textual_inversion.compile_trial import NO_ADAPTER, Pass, compile_checked, compile_fastest
from textual_inversion.compiled import graphs_work_in_threads
from textual_inversion.config import AdapterConfig, SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import compares_prompts
from textual_inversion.training_data import ImageFeatures
from textual_inversion.trial import choose_slots, samples_per_second

_CPU_SAMPLES = 8
"""Samples of a learning pass on a CPU."""

_GPU_SLOTS = 16
"""Largest number of slots that is tried on a GPU."""


def fit_slots(
    estimates: PassEstimates, config: RunConfig, image_features: ImageFeatures | None
) -> tuple[int, MemoryPlan]:
    """Return how many concepts to learn side by side, and the plan by which the model saves memory to do so.

    If one concept takes more memory than was estimated, gradient checkpointing is added where the setting is `auto`.
    Raises torch.OutOfMemoryError if that is not enough.
    """
    backbone = estimates.backbone
    plan = fit_learning(estimates, config, least_slots(backbone, config), image_features)
    if config.actors.slots:
        return config.actors.slots, plan
    try:
        return default_slots(backbone, config, image_features, plan.most_slots), plan
    except torch.OutOfMemoryError as error:
        if config.actors.gradient_checkpointing != "auto" or plan.saving.checkpoints_gradients:
            raise
        reason = describe_error(error)
    plan = add_checkpointing(backbone, plan, reason)
    return default_slots(backbone, config, image_features), plan


def least_slots(backbone: Backbone, config: RunConfig) -> int:
    """Return how many concepts an actor is to learn side by side at least: the configured number or, where that is
    open, one on a GPU and `default_slots` on a CPU."""
    if config.actors.slots or backbone.device.type == "cuda":
        return config.actors.slots or 1
    return max(1, _CPU_SAMPLES // config.inversion.batch_size)


def default_slots(
    backbone: Backbone, config: RunConfig, image_features: ImageFeatures | None, most: float = _GPU_SLOTS
) -> int:
    """Return how many concepts to learn side by side when the configuration leaves it open.

    On a GPU the number is found by trying, up to the `most` whose memory was estimated to fit, with room left for
    drawing. On a CPU it is the same on every machine, as results are promised to be: enough for a pass of 8 samples.
    (Of the demo model, passes of 16 and 32 samples are 1.2 and 1.3 times as fast, but a pass keeps its size when few
    concepts are left: docs/EXPERIMENTS.md.)
    """
    if backbone.device.type != "cuda":
        return least_slots(backbone, config)

    def rate(slots: int) -> float:
        free_bytes, _ = torch.cuda.mem_get_info(backbone.device)
        before = torch.cuda.memory_allocated(backbone.device)
        torch.cuda.reset_peak_memory_stats(backbone.device)
        found = samples_per_second(backbone, config.inversion, slots, image_features)
        if torch.cuda.max_memory_allocated(backbone.device) - before > LEARNING_SHARE * free_bytes:
            raise torch.OutOfMemoryError(f"{slots} slots leave too little room for drawing")
        return found

    slots = choose_slots(rate, int(min(most, _GPU_SLOTS)))
    torch.cuda.empty_cache()
    return slots


def compile_where_wanted(backbone: Backbone, config: RunConfig, passes: Sequence[Pass]) -> None:
    """Compile the denoiser as the setting `actors.compile` says.

    `passes` are all kinds of pass that will come; the first is the one that most time goes to. Raises RuntimeError if
    the setting is `on` or `graphs` and that cannot be done.
    """
    wanted = config.actors.compile
    if wanted == "graphs" and backbone.device.type == "cuda" and not graphs_work_in_threads():
        raise RuntimeError(
            "actors.compile = 'graphs' needs torch 2.13 or later, because an actor learns and draws on different "
            f"threads; this is torch {torch.__version__}: set it to 'auto' or 'on'"
        )
    compiles = wanted in ("on", "graphs") or (wanted == "auto" and backbone.device.type == "cuda")
    if not compiles:
        return
    name = file_name(backbone.device, backbone.model_hash(), backbone.dtype, wanted, passes)
    with kept_compilations(config.actors.compile_cache, name):
        if wanted == "auto":
            compile_fastest(backbone, passes)
        else:
            compile_checked(backbone, passes, graphs=wanted == "graphs")


def passes_to_learn(backbone: Backbone, config: RunConfig, slots: int) -> list[Pass]:
    """Return the kinds of pass of an actor with so many slots: learning, drawing sample pictures, and the evaluation
    steps if there are any."""
    size = config.inversion.batch_size
    adapter = config.inversion.adapter
    path = config.inversion.gradient_path
    passes = [
        Pass(slots * size, gradients=True, adapter=adapter, gradient_path=path),
        *drawing_passes(backbone, config.grid.sampling, adapter),
    ]
    if config.inversion.stop.needs_eval:
        passes.append(Pass(size, gradients=False, adapter=adapter, gradient_path=path))
    return passes


def drawing_passes(backbone: Backbone, config: SamplingConfig, adapter: AdapterConfig) -> list[Pass]:
    """Return the kinds of pass that draw a batch of pictures; guidance doubles its samples.

    `adapter`: settings of the adapters that concepts are learned with. Where they change cross-attention, a batch of
    other prompts alone is a kind of its own.
    """
    guided = compares_prompts(backbone, config)
    size = (1 + guided) * config.batch_size
    kinds = [adapter, NO_ADAPTER] if CROSS_ATTENTION in adapter.targets else [adapter]
    return [Pass(size, gradients=False, adapter=each) for each in kinds]


class PassSharing:
    """Choice of what may share a pass on an actor's device, so that a concept's bytes are those that it has alone."""

    def __init__(self, backbone: Backbone, config: RunConfig, image_features: ImageFeatures | None) -> None:
        """Take the engine's `image_features`. The denoiser must be compiled before the checks, which run it."""
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
