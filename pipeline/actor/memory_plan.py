"""Decide how an actor's model saves memory, by estimates of its passes (`textual_inversion.memory_estimate`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.actor.pass_estimates import PassEstimates
from pipeline.config import ActorConfig, RunConfig, Switch
from pipeline.store.errors import describe_error
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import PassMemory
from textual_inversion.training_data import ImageFeatures

log = logging.getLogger(__name__)

LEARNING_SHARE = 0.7
"""Largest share of the free memory that learning may take. The rest is for drawing beside it, and for what an estimate
does not count."""

_AMPLE_TO_LEARN = 2**20
"""Bytes for each value of a sample's latents that no learning pass takes: 122 kB in bfloat16 is the most of the models
in benchmarks/memory_estimate_20261127.md. Where a pass has so much, it fits without an estimate."""

_AMPLE_TO_DRAW = 2**18
"""The same of a picture that is drawn: 25 kB there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Choices by which an actor's model saves memory, and their reasons."""

    saving: MemorySaving
    most_slots: float = math.inf
    """Largest number of slots whose passes should fit."""
    description: str
    """The estimates and the decisions, in one line."""


def fit_learning(
    estimates: PassEstimates,
    config: RunConfig,
    slots: int,
    image_features: ImageFeatures | None = None,
    free: float | None = None,
) -> MemoryPlan:
    """Let the model save memory as the settings of actors say, so that a pass of `slots` concepts fits and sample
    pictures can be drawn beside it.

    `free`: bytes of free memory; None measures them.
    """
    backbone = estimates.backbone
    free = free_bytes(backbone.device) if free is None else free
    room = LEARNING_SHARE * free
    samples = slots * config.inversion.batch_size
    ample = samples * math.prod(backbone.latent_shape) * _AMPLE_TO_LEARN
    tries_slots = backbone.device.type == "cuda" and not config.actors.slots
    is_open = config.actors.gradient_checkpointing == "auto"

    def fit(choice: _Choice) -> float:
        def learning(slots: int = slots) -> PassMemory:
            return estimates.learning(choice.saving, config.inversion, slots, image_features)

        found = None
        if tries_slots or (is_open and ample > room):
            found = choice.make("checkpoints_gradients", config.actors.gradient_checkpointing, learning, room)
            choice.note(
                f"a learning pass of {samples} samples keeps {_gb(found.kept / samples)} of each and takes "
                f"{_gb(found.peak)} beside {_gb(found.weights)} of weights"
            )
        elif is_open:
            choice.note(f"a learning pass of {samples} samples takes less than {_gb(ample)}")
        choice.make_for_pictures(config.actors, config.grid.sampling, (1 - LEARNING_SHARE) * free, free)
        if not tries_slots or found is None:
            return math.inf
        each = learning(slots + 1).peak - found.peak
        return max(slots, slots + (room - found.peak) // each)

    return _plan(estimates, config.actors, free, fit)


def fit_drawing(
    estimates: PassEstimates, config: RunConfig, sampling: SamplingConfig, free: float | None = None
) -> MemoryPlan:
    """Let the model save memory as the settings of actors say, so that a batch of pictures can be drawn where nothing
    is learned; `free` as in `fit_learning`."""
    free = free_bytes(estimates.backbone.device) if free is None else free

    def fit(choice: _Choice) -> float:
        choice.make_for_pictures(config.actors, sampling, LEARNING_SHARE * free, free)
        return math.inf

    return _plan(estimates, config.actors, free, fit)


def add_checkpointing(backbone: Backbone, plan: MemoryPlan, reason: str) -> MemoryPlan:
    """Let the model use gradient checkpointing besides what the plan has; `reason`: why its estimate was too low."""
    saving = replace(plan.saving, checkpoints_gradients=True)
    backbone.save_memory(saving)
    added = f"{plan.description}; then gradient checkpointing, too: {reason}"
    log.warning("memory: %s", added)
    return MemoryPlan(saving=saving, description=added)


def _plan(estimates: PassEstimates, actors: ActorConfig, free: float, fit: Callable[[_Choice], float]) -> MemoryPlan:
    """Make the choices of `fit`, which returns the largest number of slots, and log the plan.

    Nothing is estimated where no setting is `auto`. What cannot be estimated is run without what `auto` would add.
    """
    choice = _Choice(estimates)
    choice.take(_as_configured(actors))
    most_slots = math.inf
    try:
        if "auto" in (actors.gradient_checkpointing, actors.vae_slicing, actors.vae_tiling):
            most_slots = fit(choice)
    except Exception as error:  # an operation without a fake form; settings that cannot be, the engine refuses
        log.warning("memory cannot be estimated: %s", describe_error(error), exc_info=True)
        choice.note(f"no estimate: {describe_error(error)}")
        choice.take(_as_configured(actors))
    saving = choice.saving
    ways = {
        "gradient checkpointing": saving.checkpoints_gradients,
        "slices": saving.slices,
        "tiles": saving.tiles,
    }
    used = ", ".join(name for name, wanted in ways.items() if wanted) or "nothing"
    found = "; ".join([*choice.notes, f"{_gb(free)} were free", f"used to save memory: {used}"])
    log.log(logging.WARNING if saving.tiles else logging.INFO, "memory: %s", found)
    return MemoryPlan(saving=saving, most_slots=most_slots, description=found)


def _as_configured(actors: ActorConfig) -> MemorySaving:
    """Return the ways that the settings turn on."""
    return MemorySaving(
        checkpoints_gradients=actors.gradient_checkpointing == "on",
        slices=actors.vae_slicing == "on",
        tiles=actors.vae_tiling == "on",
    )


class _Choice:
    """The ways of saving memory chosen so far; the backbone runs in them."""

    def __init__(self, estimates: PassEstimates) -> None:
        self._estimates = estimates
        self.notes: list[str] = []
        self.saving = MemorySaving()

    def take(self, saving: MemorySaving) -> None:
        """Run the backbone in these ways."""
        self.saving = saving
        self._estimates.backbone.save_memory(saving)

    def note(self, text: str) -> None:
        """Add a text to the plan's description."""
        self.notes.append(text)

    def make(self, way: str, wanted: Switch, estimate: Callable[[], PassMemory], room: float) -> PassMemory:
        """Choose one way, a field of `MemorySaving`, and return the estimate with it. `auto` takes it where a pass
        needs more than the room without and less with it."""
        without = replace(self.saving, **{way: False})
        saving = replace(self.saving, **{way: True})
        self.take(saving if wanted == "on" else without)
        found = estimate()
        if wanted != "auto" or found.peak <= room:
            return found
        self.take(saving)
        saved = estimate()
        if saved.peak < found.peak:
            return saved
        self.take(without)
        return found

    def make_for_pictures(self, actors: ActorConfig, sampling: SamplingConfig, room: float, free: float) -> None:
        """Choose how the autoencoder works: a batch of pictures is to fit in `room`; only where one alone does not fit
        in `free` is it cut into tiles, because they change it."""
        ample = sampling.batch_size * math.prod(self._estimates.backbone.latent_shape) * _AMPLE_TO_DRAW
        if "auto" not in (actors.vae_slicing, actors.vae_tiling):
            return
        if ample <= room:
            self.note(f"a batch of {sampling.batch_size} pictures takes less than {_gb(ample)}")
            return

        def drawing() -> PassMemory:
            return self._estimates.drawing(self.saving, sampling)

        def drawing_one() -> PassMemory:
            return self._estimates.drawing(self.saving, replace(sampling, batch_size=1))

        found = self.make("slices", actors.vae_slicing, drawing, room)
        if actors.vae_tiling == "on" or (actors.vae_tiling == "auto" and found.peak > free):
            self.make("tiles", actors.vae_tiling, drawing_one, free)
            found = drawing()
        self.note(f"a batch of {sampling.batch_size} pictures takes {_gb(found.peak)}")


def free_bytes(device: torch.device) -> float:
    """Return the memory that this process can still take, in bytes: of the GPU; else of the machine, or of its
    container where that has a limit; inf where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
    return min(available, _free_in_container(Path("/sys/fs/cgroup")))


def _free_in_container(group: Path) -> float:
    """Return what a control group (version 2) has left of its limit, in bytes; inf without one. Cached files that are
    not in use count as free, as Kubernetes counts them."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or "max"
        return math.inf
    return max(0, limit - used + int(counts.get("inactive_file", 0)))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
