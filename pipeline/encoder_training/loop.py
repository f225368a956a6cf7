"""The loop over the steps of an encoder's training, in each of its worker processes; no Ray.

The workers agree by sums over all of them (`torch.distributed`), so that they stop, evaluate and save at the same step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from pipeline.encoder_config import EncoderJobConfig
from pipeline.encoder_training.schedule import Split, concepts_of_step, shard, spread
from pipeline.encoder_training.state import TrainingState, load_checkpoint, save_checkpoint, save_curve
from pipeline.store.storage import RunStore

if TYPE_CHECKING:
    from textual_inversion.encoder_training import ConceptExample, EncoderTrainer

Ending = Literal["all steps", "no better for long", "stopped"]

ReadExamples = Callable[[Sequence[str]], "list[ConceptExample]"]
"""Concept ids -> their examples."""

NOT_FINITE = "its loss is not finite"


@dataclass(frozen=True, slots=True)
class Notices:
    """Requests that reach a worker while it trains."""

    stop: threading.Event = field(default_factory=threading.Event)
    """Set to make the worker save and end."""
    leave: threading.Event = field(default_factory=threading.Event)
    """Set to make the worker save and go on, as its node will be taken back; cleared by the loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """The workers of a training, as one of them sees them."""

    rank: int = 0
    num_workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all workers; every worker must call it."""
        if self.num_workers == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def union(self, values: dict[str, str]) -> dict[str, str]:
        """Return the dictionaries of all workers in one; every worker must call it."""
        if self.num_workers == 1:
            return values
        gathered: list[Any] = [None] * self.num_workers
        dist.all_gather_object(gathered, values)
        return {key: text for each in gathered for key, text in sorted(each.items())}


@dataclass(kw_only=True, slots=True)
class TrainingLoop:
    """One worker's part of a training."""

    trainer: EncoderTrainer
    read: ReadExamples
    split: Split
    config: EncoderJobConfig
    seed: int
    store: RunStore
    fingerprint: str
    """Digest of all that the training depends on; a checkpoint of another one is not resumed."""
    team: Team = field(default_factory=Team)
    notices: Notices = field(default_factory=Notices)
    watch: Callable[[TrainingState], None] = lambda _state: None
    """Called after each step."""
    report: Callable[[TrainingState], None] = lambda _state: None
    """Called by every worker after each point of the curve."""
    state: TrainingState = field(default_factory=TrainingState)

    def run(self) -> Ending:
        """Resume from the checkpoint, if there is one, and train to an end."""
        self.state, trainer = load_checkpoint(self.store, self.fingerprint)
        if trainer:
            self.trainer.load_state_dict(trainer)
        if self._has_waited():
            return "no better for long"
        for step, examples in self._steps():
            result = self.trainer.step(examples)
            self.state.step = step + 1
            self.state.loss_sum += result.loss
            self.state.loss_steps += 1
            self.state.left_out |= dict.fromkeys(result.left_out, NOT_FINITE)
            self.watch(self.state)
            if self._after_step() == "stopped":
                return "stopped"
            if self._has_waited():
                return "no better for long"
        return "all steps"

    def _after_step(self) -> Ending | None:
        """Evaluate, save and stop where the workers agree to; return `stopped` if they do."""
        stop, leave = self.team.sum(self.notices.stop.is_set(), self.notices.leave.is_set())
        is_point = self.state.step % self.config.checkpoint_steps == 0 or self.state.step == self._num_steps
        if is_point:
            self._evaluate()
        if is_point or stop or leave:
            self._save()
            self.notices.leave.clear()
        if is_point:
            self.report(self.state)
        return "stopped" if stop else None

    @property
    def _num_steps(self) -> int:
        return self.config.training.steps

    def _has_waited(self) -> bool:
        return bool(self.config.patience) and self.state.points_since_best() >= self.config.patience

    def _steps(self) -> Iterator[tuple[int, list[ConceptExample]]]:
        """Yield each step that is left, with the examples of this worker, which are read one step ahead."""
        size = self.config.training.concepts_per_step

        def read(step: int) -> list[ConceptExample]:
            chosen = concepts_of_step(self.split.trained, self.seed, step, size)
            return self.read(shard(chosen, self.team.rank, self.team.num_workers))

        with ThreadPoolExecutor(1, thread_name_prefix="examples") as pool:
            ahead = pool.submit(read, self.state.step)
            for step in range(self.state.step, self._num_steps):
                examples = ahead.result()
                ahead = pool.submit(read, step + 1)
                yield step, examples

    def _evaluate(self) -> None:
        """Add a point to the curve, and keep the encoder if it is the best so far."""
        measured = spread(self.split.held_out, self.config.evaluated)
        held_out = shard(measured, self.team.rank, self.team.num_workers)
        size = self.config.training.concepts_per_step
        losses = [
            pair
            for start in range(0, len(held_out), size)
            for pair in self._held_out_losses(held_out[start : start + size])
        ]
        finite = [loss for _, loss in losses if math.isfinite(loss)]
        self.state.left_out |= {concept_id: NOT_FINITE for concept_id, loss in losses if not math.isfinite(loss)}
        held_out_sum, count, loss_sum = self.team.sum(sum(finite), len(finite), self.state.loss_sum)
        num_losses = self.team.num_workers * max(1, self.state.loss_steps)
        is_best = self.state.add_point(loss_sum / num_losses, held_out_sum / count if count else math.inf)
        self.state.loss_sum, self.state.loss_steps = 0.0, 0
        if is_best and self.team.rank == 0:
            weights = self.trainer.averaged.state_dict()
            self.state.best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def _held_out_losses(self, concept_ids: Sequence[str]) -> Iterator[tuple[str, float]]:
        losses = self.trainer.held_out_losses(self.read(concept_ids))
        return zip(concept_ids, losses.tolist(), strict=True)

    def _save(self) -> None:
        """Store curve and checkpoint, by the first worker alone; all hold the same weights."""
        (total,) = self.team.sum(self.state.loss_sum)
        self.state.loss_sum = total / self.team.num_workers
        self.state.left_out = self.team.union(self.state.left_out)
        if self.team.rank == 0:
            save_curve(self.store, self.state.curve)
            save_checkpoint(self.store, self.state, self.trainer.state_dict(), self.fingerprint)
