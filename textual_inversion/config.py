"""Every knob of the method on one page: frozen dataclasses, each field with its unit and effect.

Standard library only. Values are checked once, here, on construction; the rest of the code trusts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

NormControl = Literal["none", "clamp", "sphere"]
Solver = Literal["ddim", "dpm++"]
Precision = Literal["float32", "bfloat16", "float16"]


def check(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError, naming the field, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Which views of a photo are encoded once and learned from (the moments of each view are cached)."""

    flip: bool = True
    """Also learn the mirror image. Turn off for concepts with text or a handed shape."""

    crops: int = 0
    """Random crops added per photo. More views, more encoding before the first step."""

    min_crop_scale: float = 0.75
    """Smallest crop, as a fraction of the photo's side."""

    def __post_init__(self) -> None:
        check(self.crops >= 0, "augment.crops", self.crops, "0 or more")
        check(0 < self.min_crop_scale <= 1, "augment.min_crop_scale", self.min_crop_scale, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionConfig:
    """How one concept is learned. Everything here enters the concept's fingerprint."""

    steps: int = 500
    """Optimizer steps per concept."""

    batch_size: int = 4
    """Samples of one concept in one step; its loss is their mean."""

    learning_rate: float = 5e-3
    """AdamW's rate on the embedding rows, constant. Not scaled by batch size or device count."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled decay of the rows toward zero per step, times the learning rate."""

    max_grad_norm: float = 0.0
    """Clip each concept's own gradient to this norm; 0 turns clipping off."""

    norm_control: NormControl = "clamp"
    """After each step: `none`; `clamp` rows to at most the vocabulary's mean norm (TextBoost);
    `sphere` rescales every row to exactly that norm."""

    class_cue: bool = False
    """Append the initializer word after the placeholder in training prompts ("a photo of a <cat-toy> toy")."""

    init_noise: float = 0.0
    """Standard deviation added to the start, in units of the vocabulary's per-coordinate deviation.
    With several vectors, rows after the first always get at least 0.1, else they would stay equal."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check(self.steps >= 1, "inversion.steps", self.steps, "1 or more")
        check(self.batch_size >= 1, "inversion.batch_size", self.batch_size, "1 or more")
        check(self.learning_rate > 0, "inversion.learning_rate", self.learning_rate, "positive")
        check(0 <= self.adam_beta1 < 1, "inversion.adam_beta1", self.adam_beta1, "in [0, 1)")
        check(0 <= self.adam_beta2 < 1, "inversion.adam_beta2", self.adam_beta2, "in [0, 1)")
        check(self.adam_epsilon > 0, "inversion.adam_epsilon", self.adam_epsilon, "positive")
        check(self.weight_decay >= 0, "inversion.weight_decay", self.weight_decay, "0 or more")
        check(self.max_grad_norm >= 0, "inversion.max_grad_norm", self.max_grad_norm, "0 (off) or positive")
        check(self.norm_control in ("none", "clamp", "sphere"), "inversion.norm_control", self.norm_control,
               "'none', 'clamp' or 'sphere'")  # fmt: skip
        check(self.init_noise >= 0, "inversion.init_noise", self.init_noise, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How a picture is drawn from a prompt."""

    solver: Solver = "dpm++"
    """`dpm++` is DPM-Solver++(2M); `ddim` is deterministic DDIM (eta 0), the papers' sampler."""

    steps: int = 20
    """Denoising steps per picture."""

    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 turns it off and halves the cost."""

    batch_size: int = 16
    """Pictures in one forward pass. Batches are padded to this size, so a picture never depends on its company."""

    def __post_init__(self) -> None:
        check(self.solver in ("ddim", "dpm++"), "sampling.solver", self.solver, "'ddim' or 'dpm++'")
        check(self.steps >= 1, "sampling.steps", self.steps, "1 or more")
        check(self.guidance_scale >= 1, "sampling.guidance_scale", self.guidance_scale, "1 or more")
        check(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
