"""Optimise any of the demo's three trainings: budget, learning rate, clipping, logging, checkpoints.

A training gives the loss of one step; the loop does the rest and can continue after a stop. The states of the numpy and
torch generators are kept in the checkpoint with the optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """End of a training: after `steps`, or after `minutes` of wall-clock time where steps is 0."""

    steps: int = 0
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError(f"give steps or minutes, not both or none: {self.steps=}, {self.minutes=}")

    def fraction_done(self, step: int, elapsed_s: float) -> float:
        """Return the part of the budget that is used: 0 at the start, 1 at the end."""
        return min(1.0, step / self.steps if self.steps else elapsed_s / (60 * self.minutes))


@dataclass(kw_only=True)
class Randomness:
    """Random generators of one training."""

    seed: int
    device: torch.device
    numpy: np.random.Generator = field(init=False)
    torch: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.numpy = np.random.default_rng(self.seed)
        self.torch = torch.Generator(self.device).manual_seed(self.seed)

    def state_dict(self) -> dict:
        """Return both generator states."""
        return {"numpy": self.numpy.bit_generator.state, "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue both generators from stored states."""
        self.numpy.bit_generator.state = state["numpy"]
        self.torch.set_state(state["torch"].cpu())


class Average:
    """Exponential moving average of a module's parameters, kept in fp32."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module = module
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in one more step; the first steps weigh more, so that the random start is soon forgotten."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, list(self.module.parameters()), weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged parameters into another module of the same layout."""
        for target, value in zip(module.parameters(), self.values, strict=True):
            target.copy_(value)

    def state_dict(self) -> dict:
        """Return the averages."""
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        """Continue from stored averages."""
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)


def learning_rate_factor(
    step: int, fraction_done: float, warmup_steps: int, decay_from: float = 0.0, floor: float = 0.03
) -> float:
    """Return a linear warm-up times a cosine that falls from 1 at `decay_from` of the budget to `floor` at its end."""
    fraction_decayed = max(0.0, fraction_done - decay_from) / (1 - decay_from)
    cosine = 0.5 * (1 + math.cos(math.pi * fraction_decayed))
    return min(1.0, (step + 1) / warmup_steps) * (floor + (1 - floor) * cosine)


@dataclass(kw_only=True)
class Training:
    """Training as the loop sees it: its loss, optimizer, budget and checkpoint."""

    name: str
    loss: Callable[[float], tuple[Tensor, dict[str, float]]]
    """Function from the used fraction of the budget to the loss of one step and figures to log."""
    optimizer: torch.optim.Optimizer
    budget: Budget
    checkpoint: Path
    stateful: dict
    """Objects with a `state_dict` that a continued run needs: modules, averages, randomness."""
    warmup_steps: int = 100
    decay_from: float = 0.0
    """Part of the budget at whose end the learning rate begins to fall."""
    log_every_steps: int = 50
    save_every_s: float = 600.0
    after_step: Callable[[int], None] = lambda step: None
    on_save: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        if not 0 <= self.decay_from < 1:
            raise ValueError(f"decay_from must be from 0 to below 1: {self.decay_from}")

    def save(self, step: int, elapsed_s: float) -> None:
        """Write the checkpoint, complete or not at all."""
        state = {key: part.state_dict() for key, part in self.stateful.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": step, "elapsed_s": elapsed_s}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def load(self) -> tuple[int, float]:
        """Load the checkpoint; return the step and elapsed seconds to continue from, (0, 0.0) without a checkpoint."""
        if not self.checkpoint.exists():
            return 0, 0.0
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=False)
        for key, part in self.stateful.items():
            part.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["elapsed_s"]


def optimise(training: Training) -> int:
    """Run to the end of the budget; return the total number of steps."""
    step, elapsed_s = training.load()
    optimizer = training.optimizer
    base_rates = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start_s = time.monotonic() - elapsed_s
    saved_s = elapsed_s
    smooth: dict[str, float] = {}
    while (fraction := training.budget.fraction_done(step, elapsed_s)) < 1:
        factor = learning_rate_factor(step, fraction, training.warmup_steps, training.decay_from)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        loss, figures = training.loss(fraction)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        training.after_step(step)
        step += 1
        elapsed_s = time.monotonic() - start_s
        for key, value in figures.items():
            smooth[key] = 0.95 * smooth.get(key, value) + 0.05 * value
        if step % training.log_every_steps == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in smooth.items())
            print(f"{training.name} step {step} {elapsed_s:.0f}s lr x{factor:.3f} {text}", flush=True)
        if elapsed_s - saved_s > training.save_every_s:
            training.save(step, elapsed_s)
            training.on_save(step)
            saved_s = elapsed_s
    training.save(step, elapsed_s)
    training.on_save(step)
    return step
