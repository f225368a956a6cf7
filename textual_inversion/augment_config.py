"""The settings of the augmentation of photos. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual_inversion.config_checks import require, require_choice

TransformSet = Literal["release", "late"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of photos. Each augmented picture is encoded once, before the first step, and its moments are kept;
    more pictures per photo mean more encoding."""

    flip: bool = True
    """Learn the mirror image, too. Turn off for concepts with text or a handed shape."""

    crops: int = 0
    """Number of random crops added per photo."""

    min_crop_scale: float = 0.75
    """Side of the smallest crop, as a fraction of the photo's shorter side, in (0, 1]."""

    max_crop_scale: float = 1.0
    """Side of the largest crop, in the same unit, `min_crop_scale` or more."""

    colours: int = 0
    """Number of pictures with changed brightness, contrast and saturation added per photo."""

    colour_strength: float = 0.2
    """Largest change of brightness, contrast and saturation, as a fraction of their value, in (0, 1)."""

    paired: int = 0
    """TextBoost's paired augmentation: number of transformed pictures added per photo. Their prompts name the
    transforms by augmentation tokens ("A* photo of V*"), which are learned with the concept and left out of the
    prompts that pictures are drawn from."""

    paired_probability: float = 0.8
    """Probability with which each of the three groups of transforms (geometry, colour, other) acts on such a picture,
    in (0, 1]. In the set `late` the colours act with probability 0.2 whatever this is."""

    paired_set: TransformSet = "release"
    """Version of TextBoost's code that transforms and tokens are taken from (`paired_augment`). `release`: 13 September
    2024. `late`: January 2025."""

    def __post_init__(self) -> None:
        require(self.crops >= 0, "augment.crops", self.crops, "0 or more")
        scales = (self.min_crop_scale, self.max_crop_scale)
        require(
            0 < scales[0] <= scales[1] <= 1, "augment.min_crop_scale, max_crop_scale", scales, "0 < min <= max <= 1"
        )
        require(self.colours >= 0, "augment.colours", self.colours, "0 or more")
        require(0 < self.colour_strength < 1, "augment.colour_strength", self.colour_strength, "in (0, 1)")
        require(self.paired >= 0, "augment.paired", self.paired, "0 or more")
        require(0 < self.paired_probability <= 1, "augment.paired_probability", self.paired_probability, "in (0, 1]")
        require_choice("augment.paired_set", self.paired_set, TransformSet)
