"""A trainer whose weight moves as the examples say, in place of the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.encoder_config import EncoderJobConfig
from pipeline.encoder_training.loop import Team, TrainingLoop
from pipeline.encoder_training.schedule import Split
from pipeline.store.storage import RunStore
from textual_inversion.encoder_config import EncoderTrainingConfig

SPLIT = Split(tuple(f"c{i:02d}" for i in range(10)), ("h0", "h1", "h2"))


@dataclass(frozen=True)
class Result:
    loss: float
    left_out: tuple[str, ...]


class StandInTrainer:
    """Adds up the numbers in the names of the concepts that it is given; its held-out loss is `held_out(step)`."""

    def __init__(self, held_out: Callable[[int], float] = lambda step: 1 / step, poisoned: Sequence[str] = ()) -> None:
        self.weight = torch.zeros(1)
        self.taken = 0
        self.seen: list[list[str]] = []
        self._held_out = held_out
        self._poisoned = set(poisoned)

    @property
    def averaged(self) -> Any:
        return SimpleNamespace(state_dict=lambda: {"weight": self.weight / 2})

    def step(self, examples: Sequence[str]) -> Result:
        bad = tuple(name for name in examples if name in self._poisoned)
        numbers = [float(name[1:]) for name in examples if name not in bad]
        self.weight = self.weight + sum(numbers)
        self.taken += 1
        self.seen.append(list(examples))
        return Result(sum(numbers) / len(examples), bad)

    def held_out_losses(self, examples: Sequence[str]) -> Tensor:
        loss = self._held_out(self.taken)
        return torch.tensor([nan if name in self._poisoned else loss for name in examples])

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.taken = state["weight"], state["taken"]


def loop_of(trainer: StandInTrainer, store: RunStore, *, steps: int = 12, team: Team | None = None,
            fingerprint: str = "f", **settings: Any) -> TrainingLoop:  # fmt: skip
    training = EncoderTrainingConfig(steps=steps, concepts_per_step=4)
    config = EncoderJobConfig(training=training, **{"checkpoint_steps": 4, **settings})
    return TrainingLoop(
        trainer=trainer,  # type: ignore[arg-type]
        read=list,  # type: ignore[arg-type]
        split=SPLIT,
        config=config,
        seed=0,
        store=store,
        fingerprint=fingerprint,
        team=team or Team(),
    )
