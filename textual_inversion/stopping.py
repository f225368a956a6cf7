"""When a concept is finished. A rule sees only that concept's own steps and curve, never its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class CurvePoint(NamedTuple):
    """One optimizer step of one concept."""

    step: int
    loss: float
    norm: float
    """Mean L2 norm of the concept's rows after the step."""


class StopRule(Protocol):
    """Asked only at steps it names as due: reading the curve makes the host wait for the accelerator."""

    def due(self, step: int) -> bool:
        """Whether to ask after this many steps of the concept."""
        ...

    def stops(self, curve: Sequence[CurvePoint]) -> bool:
        """Whether the concept ends here; the curve holds every step it has taken."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """A fixed number of steps, as in Gal et al. 2022."""

    steps: int

    def due(self, step: int) -> bool:
        return step >= self.steps

    def stops(self, curve: Sequence[CurvePoint]) -> bool:
        return len(curve) >= self.steps
