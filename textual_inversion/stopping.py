"""When a concept is finished. A rule sees only that concept's own steps and losses, never its neighbours'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pvariance
from typing import NamedTuple, Protocol

from textual_inversion.config import InversionConfig


class CurvePoint(NamedTuple):
    """One optimizer step of one concept."""

    step: int
    loss: float
    norm: float
    """Mean L2 norm of the concept's rows after the step."""


class FrozenLoss(NamedTuple):
    """One look at a concept's frozen batch, which is the same at every look: views, noise, timesteps, templates."""

    step: int
    """Optimizer steps taken before it."""
    loss: float


class StopRule(Protocol):
    """Asked only at steps it names as due: reading the curve makes the host wait for the accelerator. The answer takes
    effect at that very step, however many steps are read at a time: what is returned depends on no neighbour."""

    def due(self, step: int) -> bool:
        """Whether to ask after this many steps of the concept."""
        ...

    def stops(self, curve: Sequence[CurvePoint], frozen_losses: Sequence[FrozenLoss]) -> bool:
        """Whether the concept ends here; the curve holds every step it has taken."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """A fixed number of steps, as in Gal et al. 2022."""

    steps: int

    def due(self, step: int) -> bool:
        return step >= self.steps

    def stops(self, curve: Sequence[CurvePoint], _frozen_losses: Sequence[FrozenLoss]) -> bool:
        return len(curve) >= self.steps


@dataclass(frozen=True, slots=True)
class Dvar:
    """Voronov et al. 2023: the training loss is mostly noise, that on a frozen batch is not; end when it has settled,
    or at the budget."""

    steps: int
    check_every_steps: int
    window: int
    variance_ratio: float

    def due(self, step: int) -> bool:
        return step >= self.steps or step % self.check_every_steps == 0

    def stops(self, curve: Sequence[CurvePoint], frozen_losses: Sequence[FrozenLoss]) -> bool:
        losses = [look.loss for look in frozen_losses]
        return len(curve) >= self.steps or settled(losses, self.window, self.variance_ratio)


def settled(losses: Sequence[float], window: int, variance_ratio: float) -> bool:
    """Voronov et al. 2023, section 4: Var(last `window` losses) / Var(all losses) < `variance_ratio`."""
    if len(losses) < window:
        return False
    return pvariance(losses[-window:]) < variance_ratio * pvariance(losses)


def rule_of(config: InversionConfig) -> StopRule:
    """The rule that the configuration names."""
    stop = config.stop
    if stop.method == "dvar":
        return Dvar(config.steps, stop.check_every_steps, stop.window, stop.variance_ratio)
    return Budget(config.steps)


def looks(config: InversionConfig, step: int) -> bool:
    """Whether the frozen batch is looked at after this many steps of a concept."""
    stop = config.stop
    return stop.needs_eval and (step % stop.check_every_steps == 0 or step == config.steps)
