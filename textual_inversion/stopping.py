"""Rules that decide when a concept is finished. A rule sees only that concept's own steps and losses."""

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


class EvalLoss(NamedTuple):
    """The denoising loss of one evaluation step, on the concept's evaluation batch.

    That batch has the same views, noise, timesteps and prompts at every evaluation step of the concept.
    """

    step: int
    """Optimizer steps taken before the evaluation."""
    loss: float


class StopRule(Protocol):
    """A rule that ends a concept, asked only after steps for which `due` is true.

    Reading the curve makes the host wait for the accelerator, hence `due`. The answer takes effect at the step it is
    about, however many steps are read at a time, so that a concept's result depends on no neighbour.
    """

    def due(self, step: int) -> bool:
        """Return whether the rule must be asked after this many steps of the concept."""
        ...

    def stops(self, curve: Sequence[CurvePoint], eval_losses: Sequence[EvalLoss]) -> bool:
        """Return whether the concept ends here. The curve holds every step that the concept has taken."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """A fixed number of steps, as in Gal et al. 2022."""

    steps: int

    def due(self, step: int) -> bool:
        return step >= self.steps

    def stops(self, curve: Sequence[CurvePoint], _eval_losses: Sequence[EvalLoss]) -> bool:
        return len(curve) >= self.steps


@dataclass(frozen=True, slots=True)
class Dvar:
    """The rule of Voronov et al. 2023: end when the loss on a fixed batch has settled, or at the budget.

    The training loss cannot show that: most of its variance is the draw of noise and timesteps.
    """

    steps: int
    check_every_steps: int
    window: int
    variance_ratio: float

    def due(self, step: int) -> bool:
        return step >= self.steps or step % self.check_every_steps == 0

    def stops(self, curve: Sequence[CurvePoint], eval_losses: Sequence[EvalLoss]) -> bool:
        losses = [evaluation.loss for evaluation in eval_losses]
        return len(curve) >= self.steps or settled(losses, self.window, self.variance_ratio)


def settled(losses: Sequence[float], window: int, variance_ratio: float) -> bool:
    """Return whether Var(last `window` losses) / Var(all losses) < `variance_ratio` (Voronov et al. 2023, sec. 4)."""
    if len(losses) < window:
        return False
    return pvariance(losses[-window:]) < variance_ratio * pvariance(losses)


def stop_rule_from_config(config: InversionConfig) -> StopRule:
    """Return the rule that the configuration names."""
    stop = config.stop
    if stop.method == "dvar":
        return Dvar(config.steps, stop.check_every_steps, stop.window, stop.variance_ratio)
    return Budget(config.steps)


def is_eval_step(config: InversionConfig, step: int) -> bool:
    """Return whether a concept is evaluated on its evaluation batch after this many of its steps."""
    stop = config.stop
    return stop.needs_eval and (step % stop.check_every_steps == 0 or step == config.steps)
