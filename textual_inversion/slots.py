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
from textual_inversion.material import Material
from textual_inversion.stopping import CurvePoint, FrozenLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """All that is needed to continue a concept exactly. No random state: draws are seeded by the step's number."""

    step: int
    parameters: Mapping[str, Tensor]
    """Name (`parameters.Layout`) -> [vectors, dim] float32 CPU; so are Adam's moments and the next two."""
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    """The parameters before the first step."""
    best: Mapping[str, Tensor]
    """The parameters when the loss on the frozen batch was least; empty unless `stop.keep_best`."""
    curve: Tensor
    """[step, 3] float32: step, loss, norm."""
    frozen_losses: Tensor
    """[looks, 2] float32: step, loss on the frozen batch."""

    @classmethod
    def beginning(cls, parameters: Mapping[str, Tensor]) -> SlotState:
        """Before the first step, with these parameters."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        return cls(
            step=0, parameters=parameters, exp_avg=zeros, exp_avg_sq=zeros, start=parameters, best={},
            curve=curve_tensor([]), frozen_losses=look_tensor([]),
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """As safetensors; equal states give equal bytes."""
        tensors = {"step": torch.tensor([self.step]), "curve": self.curve, "frozen_losses": self.frozen_losses}
        for part in _PARTS:
            tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(self, part).items()}
        return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotState:
        """Raises ValueError if these are not the bytes of a slot's state."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        try:
            tensors = load(data)
            step, curve, looks = int(tensors.pop("step")), tensors.pop("curve"), tensors.pop("frozen_losses")
            for name, tensor in tensors.items():
                part, _, parameter = name.partition(".")
                parts[part][parameter] = tensor
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the checkpoint ({len(data)} bytes) is damaged: {error}; delete it") from error
        return cls(step=step, curve=curve, frozen_losses=looks, **parts)


_PARTS = ("parameters", "exp_avg", "exp_avg_sq", "start", "best")


@dataclass(frozen=True, slots=True)
class Assignment:
    """A concept for a slot, with its photos already encoded."""

    concept: Concept
    views: Views
    """From `latents.encode_views`."""
    state: SlotState | None = None
    """Continue from here."""
    start: LearnedEmbedding | None = None
    """Start from these rows, and their adapter, not from the concept's initializer."""


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
    frozen_losses: Tensor = field(default_factory=lambda: look_tensor([]))
    """[looks, 2] float32: step, loss on the frozen batch; empty where nobody looked."""


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A concept that is being learned."""

    place: int
    """Where in the stacked parameters it is."""
    concept: Concept
    material: Material
    """What its samples are drawn from."""
    start: Mapping[str, Tensor]
    """Its parameters before the first step."""
    step: int
    """Optimizer steps taken."""
    started: float
    curve: list[CurvePoint] = field(default_factory=list)
    """One point a step; may lag behind, as points are fetched from the accelerator many at a time."""
    frozen_losses: list[FrozenLoss] = field(default_factory=list)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """Its parameters when the loss on the frozen batch was least; empty unless they are to be kept."""
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


def look_tensor(looks: Sequence[FrozenLoss]) -> Tensor:
    """[n, 2] float32: step, loss on the frozen batch."""
    return torch.tensor(looks, dtype=torch.float32).reshape(-1, 2)


def look_points(looks: Tensor) -> list[FrozenLoss]:
    return [FrozenLoss(int(step), loss) for step, loss in looks.tolist()]
