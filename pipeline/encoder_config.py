"""Settings of `python -m pipeline.train_encoder`: the encoder, its training, and where and how long it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from textual_inversion.adapter_config import AdapterShape
from textual_inversion.config_checks import require
from textual_inversion.encoder_config import EncoderConfig, EncoderTrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderJobConfig:
    """Training of an encoder that maps a concept's photos to its rows, and to an adapter if one is set. None of these
    settings changes what a run learns."""

    network: EncoderConfig = field(default_factory=EncoderConfig)
    """Shape of the encoder."""

    adapter: AdapterShape = field(default_factory=AdapterShape)
    """Adapter that the encoder makes of the photos besides the rows, for runs with the same values in
    `inversion.adapter`; kind `none` makes none."""

    training: EncoderTrainingConfig = field(default_factory=EncoderTrainingConfig)
    """Optimizer, schedule and batches."""

    workers: int = 0
    """Training processes, each with a GPU or, without GPUs, with `actors.cpus` cores; 0 is one for every GPU of the
    cluster, or one without GPUs. Results with different numbers are equal to rounding. Must divide
    `encoder.training.concepts_per_step`."""

    from_run: str = ""
    """Output of an earlier run whose concepts are trained on besides the manifest's; their photos must still be those
    that the run learned."""

    init_from: str = ""
    """File of a trained encoder, or output of its training, whose weights are the start; empty starts at random."""

    held_out_share: float = 0.1
    """Share of the concepts that is held out, chosen by a hash of their ids, so that a concept held out once always
    is. At least one is held out."""

    evaluated: int = 512
    """Largest number of held-out concepts whose loss is measured, spread evenly over their ids."""

    checkpoint_steps: int = 200
    """Steps between two checkpoints; before each, the loss on the held-out concepts is measured."""

    patience: int = 10
    """Checkpoints in a row without a lower held-out loss after which training ends; 0 takes all steps. The encoder
    with the lowest held-out loss is kept in either case."""

    max_failures: int = 3
    """Times that training is resumed after a worker was lost or failed, nodes that gave notice aside."""

    shown: int = 12
    """Held-out concepts whose pictures are drawn for the report."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "encoder.workers", self.workers, "0 (automatic) or more")
        size = self.training.concepts_per_step
        divides = self.workers <= 1 or size % self.workers == 0
        require(divides, "encoder.workers", self.workers, f"a divisor of encoder.training.concepts_per_step = {size}")
        require(0 < self.held_out_share < 1, "encoder.held_out_share", self.held_out_share, "between 0 and 1")
        require(self.evaluated >= 1, "encoder.evaluated", self.evaluated, "1 or more")
        require(self.checkpoint_steps >= 1, "encoder.checkpoint_steps", self.checkpoint_steps, "1 or more")
        require(self.patience >= 0, "encoder.patience", self.patience, "0 (never) or more")
        require(self.max_failures >= 0, "encoder.max_failures", self.max_failures, "0 or more")
        require(self.shown >= 0, "encoder.shown", self.shown, "0 or more")
