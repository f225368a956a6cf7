"""What goes into a slot of the engine, what it holds meanwhile, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.latents import Views
from textual_inversion.stopping import CurvePoint


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """All that is needed to continue a concept exactly. No random state: draws are seeded by the step's number."""

    step: int
    rows: Mapping[str, Tensor]
    """Text encoder key -> [num_vectors, dim] float32 CPU; so are Adam's moments."""
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    curve: Tensor
    """[step, 3] float32: step, loss, norm."""

    @classmethod
    def beginning(cls, rows: Mapping[str, Tensor]) -> SlotState:
        """Before the first step, at these rows."""
        zeros = {key: torch.zeros_like(tensor) for key, tensor in rows.items()}
        return cls(step=0, rows=rows, exp_avg=zeros, exp_avg_sq=zeros, curve=curve_tensor([]))

    def to_bytes(self) -> bytes:
        """As safetensors; equal states give equal bytes."""
        tensors = {"step": torch.tensor([self.step]), "curve": self.curve.contiguous()}
        for name, by_key in (("rows", self.rows), ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in by_key.items()}
        return save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotState:
        """Raises ValueError if these are not the bytes of a slot's state."""
        try:
            tensors = load(data)
            step, curve = int(tensors.pop("step")), tensors.pop("curve")
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the checkpoint ({len(data)} bytes) is damaged: {error}; delete it") from error
        parts: dict[str, dict[str, Tensor]] = {"rows": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        return cls(step=step, curve=curve, **parts)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A concept for a slot, with its photos already encoded."""

    concept: Concept
    views: Views
    """From `latents.encode_views`."""
    state: SlotState | None = None
    """Continue from here."""
    start: LearnedEmbedding | None = None
    """Start from these rows, not from the concept's initializer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a concept ended: with an embedding, or with an error."""

    concept: Concept
    embedding: LearnedEmbedding | None
    steps: int
    """Optimizer steps taken, those before a resume included."""
    curve: Tensor
    """[steps, 3] float32: step, loss, norm."""
    seconds: float
    """In the slot, since the last resume."""
    error: str | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A concept that is being learned."""

    place: int
    """Where in the stacked rows it is."""
    concept: Concept
    moments: Tensor
    """[views, 2, *latent_shape] on the backbone's device."""
    prompts: Tensor
    """[templates, max_length] ids on the backbone's device; id `vocab_size + j` is the concept's row j."""
    step: int
    """Optimizer steps taken."""
    started: float
    curve: list[CurvePoint] = field(default_factory=list)
    """One point a step; may lag behind, as points are fetched from the accelerator many at a time."""
    error: str | None = None

    def note(self, loss: float, norm: float) -> None:
        """Add the next point; a point that is not finite is the concept's last, and its error."""
        if self.error:
            return
        step = len(self.curve) + 1
        self.curve.append(CurvePoint(step, loss, norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.error = (
                f"loss or gradient was not finite at step {step} (loss {loss}); lower inversion.learning_rate, "
                "or check the photos and the model's precision"
            )


def curve_tensor(curve: Sequence[CurvePoint]) -> Tensor:
    """[n, 3] float32: step, loss, norm."""
    return torch.tensor(curve, dtype=torch.float32).reshape(-1, 3)


def curve_points(curve: Tensor) -> list[CurvePoint]:
    return [CurvePoint(int(step), loss, norm) for step, loss, norm in curve.tolist()]
