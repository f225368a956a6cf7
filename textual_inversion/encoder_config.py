"""The settings of an encoder and of its training, declared and checked. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from textual_inversion.config_checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Size and shape of an encoder."""

    hidden: int = 512
    """Width of the hidden layers."""

    patch_dim: int = 24
    """Width that each cell of the extractor's patch tokens is projected to."""

    grid_side: int = 4
    """Side of the grid that the extractor's patch tokens are averaged to, cells."""

    latent_side: int = 4
    """Side that the photo's latents are averaged to, latent pixels; 0 leaves the latents out."""

    denoiser_side: int = 0
    """Side of the grid that the features behind the U-Net's middle block are averaged to, cells; 0 leaves them out."""

    num_vectors: int = 1
    """Number of rows that the encoder makes for each concept."""

    max_offset: float = 4.0
    """Bound on the norm of a row's offset, in units of the norm of the vocabulary's deviation."""

    def __post_init__(self) -> None:
        for name in ("hidden", "patch_dim", "grid_side", "num_vectors"):
            require(getattr(self, name) >= 1, f"encoder.network.{name}", getattr(self, name), "1 or more")
        for name in ("latent_side", "denoiser_side"):
            require(getattr(self, name) >= 0, f"encoder.network.{name}", getattr(self, name), "0 (off) or more")
        require(self.max_offset > 0, "encoder.network.max_offset", self.max_offset, "positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderTrainingConfig:
    """Settings of the training of an encoder."""

    steps: int = 10_000
    """Number of optimizer steps."""

    concepts_per_step: int = 32
    """Concepts in one step."""

    samples_per_concept: int = 2
    """Samples of each of them."""

    learning_rate: float = 1e-3
    """Learning rate of AdamW, from the end of the warm-up to the beginning of the decay."""

    weight_decay: float = 0.01
    """Decoupled decay of the matrices toward zero."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""

    decay_share: float = 0.3
    """Share of the steps, the last, over which the learning rate falls to zero."""

    max_grad_norm: float = 1.0
    """Norm that the gradient is clipped to."""

    averaging: float = 0.998
    """Decay per step of the average of the weights over the steps, which is what is kept."""

    class_noun_share: float = 0.25
    """Share of samples whose prompt names the initializer behind the concept ("a photo of a V* cat")."""

    no_initializer_share: float = 0.15
    """Share of draws in which the offset is added to the vocabulary's mean, as for a concept without an initializer."""

    other_photo_share: float = 0.8
    """Share of samples that show another photo than those the rows are made from, where there is another."""

    max_photos: int = 5
    """Most photos that rows are made from."""

    offset_weight: float = 1e-3
    """Weight of the squared norm of the offsets."""

    row_weight: float = 0.0
    """Weight of the squared distance of the rows from those that an earlier run learned of the concept, where it did;
    0 reads none of them."""

    def __post_init__(self) -> None:
        for name in ("steps", "concepts_per_step", "samples_per_concept", "max_photos"):
            require(getattr(self, name) >= 1, f"encoder.training.{name}", getattr(self, name), "1 or more")
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"encoder.training.{name}", getattr(self, name), "positive")
        for name in ("weight_decay", "warmup_steps", "offset_weight", "row_weight"):
            require(getattr(self, name) >= 0, f"encoder.training.{name}", getattr(self, name), "0 or more")
        for name in ("decay_share", "class_noun_share", "no_initializer_share", "other_photo_share"):
            require(0 <= getattr(self, name) <= 1, f"encoder.training.{name}", getattr(self, name), "in [0, 1]")
        require(0 <= self.averaging < 1, "encoder.training.averaging", self.averaging, "in [0, 1)")

    def rate_factor(self, step: int) -> float:
        """Return the factor on the learning rate at a step, counted from 0: a rise, a plateau and a fall to zero."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return max(0.0, min(rise, fall))
