"""Choose how many concepts are learned at a time, by timing the learning of made-up ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from textual_inversion.concept import Concept
from textual_inversion.config import InitConfig, InversionConfig, StopConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.families.base import Backbone
from textual_inversion.latents import EncodedViews
from textual_inversion.paired_augment import Augmentation
from textual_inversion.training_data import ImageFeatures

MIN_GAIN = 1.05
"""Least gain in speed for which the number of slots is doubled. With more slots each concept takes longer, and an actor
that dies loses more steps."""

_STEPS = 4
"""Steps that are timed, after as many that are not."""


def choose_slots(rate: Callable[[int], float], at_most: int) -> int:
    """Return the first of 1, 2, 4, ... slots for which twice as many are less than `MIN_GAIN` times as fast.

    `rate` returns the samples per second of a number of slots; it raises torch.OutOfMemoryError for more than fit.
    """
    slots = 1
    best = rate(1)
    while 2 * slots <= at_most:
        try:
            twice = rate(2 * slots)
        except torch.OutOfMemoryError:
            break
        if twice < MIN_GAIN * best:
            break
        slots, best = 2 * slots, twice
    return slots


def samples_per_second(
    backbone: Backbone, config: InversionConfig, slots: int, image_features: ImageFeatures | None = None
) -> float:
    """Measure the speed with all slots full, in samples per second.

    Only the second half of the steps is timed: in the first, libraries choose their kernels. Raises
    torch.OutOfMemoryError if so many slots do not fit.
    """
    config = replace(config, steps=2 * _STEPS, progressive=False, init=InitConfig(), stop=StopConfig())
    engine = Engine(backbone, config, slots=slots, seed=0, image_features=image_features)
    views = EncodedViews(
        moments=torch.ones(1, 2, *backbone.latent_shape), photo_indices=(0,), augmentations=(Augmentation(),)
    )
    waiting = [
        Assignment(Concept(concept_id=f"{i}", placeholder_token=f"<{i}>", images=("none",)), views)
        for i in range(slots)
    ]
    half_way: list[float] = []

    def note_time(_concept: Concept, _state: SlotState) -> None:  # reading the state back left the device idle
        half_way.append(time.perf_counter())

    def check(outcome: Outcome) -> None:
        if outcome.error:
            raise ValueError(f"a made-up concept cannot be learned: {outcome.error}")

    engine.run(lambda _wait: waiting.pop() if waiting else None, check, note_time, checkpoint_steps=_STEPS)
    return slots * config.batch_size * _STEPS / (time.perf_counter() - half_way[-1])
