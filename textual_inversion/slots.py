"""A slot of the engine (`Slot`), with what enters it (`Assignment`) and what leaves it (`Outcome`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.errors import BadInput, ErrorKind, NotFinite
from textual_inversion.latents import EncodedViews
from textual_inversion.objective import Batch
from textual_inversion.optim import ParameterGroup
from textual_inversion.parameters import Layout, num_photos
from textual_inversion.slot_state import (
    SlotState,
    curve_points,
    curve_tensor,
    eval_points,
    eval_tensor,
    to_cpu,
)
from textual_inversion.stopping import CurvePoint, EvalLoss, StopRule
from textual_inversion.training_data import TrainingData

MAX_ROLLBACKS = 2
"""Most rollbacks of a concept; the next loss that is not finite ends it."""

ROLLBACK_LR_SCALE = 0.1
"""Factor on a concept's learning rates for each rollback."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A concept for a slot, with its photos already encoded."""

    concept: Concept
    views: EncodedViews
    """The encoded photos, from `latents.encode_views`."""
    state: SlotState | None = None
    """State to continue from; None starts anew."""
    start: LearnedEmbedding | None = None
    """Rows, and their adapter, to start from; None starts from the concept's initializer."""
    steps: int | None = None
    """Largest number of steps of this concept; None is `steps` of the configuration."""

    def check(self, layout: Layout) -> None:
        """Raise a ConceptError if the assignment would fail later, or make its neighbours fail."""
        moments = self.views.moments
        backbone = layout.backbone
        shapes = layout.shapes(self.concept, num_photos(self.views))
        wanted = (2, *backbone.latent_shape)
        if moments.ndim != 5 or moments.shape[0] == 0 or moments.shape[1:] != wanted:
            raise BadInput(f"moments have shape {tuple(moments.shape)}; this model needs [views, {wanted}]")
        if not moments.isfinite().all():
            raise NotFinite("the photos' latents are not finite; check the photos and the autoencoder's precision")
        if self.state is not None:
            self.state.check(shapes, {name: shape for name, shape in shapes.items() if name in backbone.token_tables})
        elif (method := layout.config.init.method) not in ("words", "earlier") and self.start is None:
            raise BadInput(f"init.method {method!r} chooses the start by the photos: pass a start from StartChooser")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a concept: its embedding, or the error that ended it."""

    concept: Concept
    embedding: LearnedEmbedding | None
    """The learned embedding; None if there was an error."""
    steps: int
    """Optimizer steps taken, those before a resume included."""
    curve: Tensor
    """Step, loss and norm of each step, [steps, 3] float32."""
    seconds: float
    """Time in the slot, since the last resume."""
    error: str | None = None
    eval_losses: Tensor = field(default_factory=lambda: eval_tensor([]))
    """Step and loss of each evaluation, [evaluations, 2] float32; empty if there was none."""
    setbacks: int = 0
    """Number of rollbacks to an earlier state after a loss that was not finite."""
    kind: ErrorKind | None = None
    """Kind of the error; None where there is none."""


class Preview(NamedTuple):
    """A concept as it is between two steps."""

    concept: Concept
    step: int
    """Optimizer steps taken."""
    embedding: LearnedEmbedding


@dataclass(frozen=True, slots=True)
class SlotProgress:
    """Progress of the concept in a slot."""

    concept_id: str
    step: int
    """Optimizer steps taken."""
    steps: int
    """Largest number of steps."""
    loss: float | None
    """Last loss read back; None before the first."""

    @classmethod
    def of(cls, slot: Slot) -> SlotProgress:
        curve = slot.curve
        loss = curve[-1].loss if curve else None
        return cls(slot.concept.concept_id, slot.step, slot.config.steps, loss)


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A concept that is being learned."""

    index: int
    """Index of the slot in the stacked parameters."""
    concept: Concept
    config: InversionConfig
    """The engine's configuration, with the steps of this concept."""
    stop_rule: StopRule
    """Rule that ends the concept."""
    data: TrainingData
    """Source of the concept's samples."""
    num_vectors: Mapping[str, int]
    """Number of vectors of each parameter, auxiliary rows included."""
    start: Mapping[str, Tensor]
    """Rows before the first step."""
    step: int
    """Optimizer steps taken."""
    started: float
    """Time at which the concept entered the slot, by `time.perf_counter`."""
    curve: list[CurvePoint] = field(default_factory=list)
    """One point for each step that has been read back; the latest steps may be missing."""
    eval_batch: Batch | None = None
    """Batch of all evaluations; drawn for the first one, and again, equal, after a resume."""
    eval_losses: list[EvalLoss] = field(default_factory=list)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters at the lowest evaluation loss; empty unless `stop.keep_best`. On the device until a checkpoint copies
    them."""
    setbacks: int = 0
    """Number of rollbacks."""
    last_good: SlotState | None = None
    """State to roll back to; its tensors are on the device until a checkpoint copies them."""
    error: str | None = None
    """Reason why the concept cannot go on as it is."""

    @classmethod
    def at_state(
        cls,
        state: SlotState,
        *,
        index: int,
        concept: Concept,
        config: InversionConfig,
        stop_rule: StopRule,
        data: TrainingData,
    ) -> Slot:
        """Make the slot of a concept that goes on from a state; the stacks are not written."""
        return cls(
            index=index,
            concept=concept,
            config=config,
            stop_rule=stop_rule,
            data=data,
            num_vectors={name: len(tensor) for name, tensor in state.parameters.items()},
            start=state.start,
            step=state.step,
            curve=curve_points(state.curve),
            eval_losses=eval_points(state.eval_losses),
            best=state.best,
            setbacks=state.setbacks,
            last_good=state.last_good or state,
            started=time.perf_counter(),
        )

    @property
    def lr_scale(self) -> float:
        """Factor on the concept's learning rates."""
        return ROLLBACK_LR_SCALE**self.setbacks

    @property
    def best_eval(self) -> EvalLoss:
        """Evaluation with the lowest finite loss; one of infinite loss if there is none."""
        finite = [evaluation for evaluation in self.eval_losses if math.isfinite(evaluation.loss)]
        return min(finite, key=lambda evaluation: evaluation.loss, default=EvalLoss(0, math.inf))

    def add_step(self, loss: float, norm: float, eval_loss: float | None, evaluated: Mapping[str, Tensor]) -> None:
        """Add the numbers of the next step to the curve, and of its evaluation if there was one.

        `evaluated`: the parameters at that evaluation, kept if none were better; empty if the best are not kept. A
        step that is not finite becomes the concept's error, and later steps are ignored.
        """
        if self.error:
            return
        step = len(self.curve) + 1
        self.curve.append(CurvePoint(step, loss, norm))
        if eval_loss is not None:
            if evaluated and eval_loss < self.best_eval.loss:
                self.best = evaluated
            self.eval_losses.append(EvalLoss(step, eval_loss))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            again = f", {self.setbacks} times at a lower rate" if self.setbacks else ""
            self.error = (
                f"loss or gradient was not finite at step {step} (loss {loss}{again}); lower inversion.learning_rate, "
                "or check the photos and the model's precision"
            )

    def keep_as_last_good(self, groups: Mapping[str, ParameterGroup]) -> None:
        """Make the present state the one to roll back to. All steps must have been read back."""
        self.last_good = self._snapshot(groups)

    def roll_back(self, groups: Mapping[str, ParameterGroup]) -> None:
        """Return to the last good state with lower learning rates, and clear the error.

        The error stays if there were `MAX_ROLLBACKS` already, or if the step that failed is the first after the last
        good state: it does not depend on the learning rate.
        """
        good = self.last_good
        if good is None or self.setbacks == MAX_ROLLBACKS or len(self.curve) <= good.step + 1:
            return
        good.write_to(groups, self.index)
        self.step = good.step
        self.best = good.best
        self.error = None
        self.curve = curve_points(good.curve)
        self.eval_losses = eval_points(good.eval_losses)
        self.setbacks += 1

    def parameters(self, groups: Mapping[str, ParameterGroup]) -> dict[str, Tensor]:
        """Copy the concept's parameters, on the device: name -> [vectors, dim]."""
        return {name: group.read(self.index, self.num_vectors[name])[0] for name, group in groups.items()}

    def state(self, groups: Mapping[str, ParameterGroup]) -> SlotState:
        """Copy the concept's state to the CPU. The best and the last good parameters are copied once, not each time."""
        self.best = to_cpu(self.best)
        self.last_good = self.last_good and self.last_good.to_cpu()
        if self.last_good is not None and self.last_good.step == self.step:
            now = self.last_good
        else:
            now = self._snapshot(groups).to_cpu()
        return replace(now, setbacks=self.setbacks, last_good=self.last_good)

    def _snapshot(self, groups: Mapping[str, ParameterGroup]) -> SlotState:
        """Copy the concept's state, on the device, without the last good state."""
        tensors = {name: group.read(self.index, self.num_vectors[name]) for name, group in groups.items()}
        return SlotState(
            step=self.step,
            parameters={name: values for name, (values, _, _) in tensors.items()},
            exp_avg={name: exp_avg for name, (_, exp_avg, _) in tensors.items()},
            exp_avg_sq={name: exp_avg_sq for name, (_, _, exp_avg_sq) in tensors.items()},
            start=self.start,
            best=self.best,
            curve=curve_tensor(self.curve),
            eval_losses=eval_tensor(self.eval_losses),
            setbacks=self.setbacks,
        )


def step_counts(slots: Sequence[Slot | None], num_rows: int) -> Tensor:
    """Return in how many steps each row has been trained, [slots, num_rows] int64 on the CPU; 0 in an empty slot.

    Only placeholder rows that become active later (`TrainingData.first_steps`) have fewer steps than their concept.
    The first row always has as many.
    """
    counts = []
    for slot in slots:
        first_steps, step = (slot.data.first_steps, slot.step) if slot else ((), 0)
        counts.append([max(0, step - first) for first in first_steps] + [step] * (num_rows - len(first_steps)))
    return torch.tensor(counts)


class Readback(NamedTuple):
    """The numbers of one step while they are copied from the device to the host."""

    slots: list[Slot]
    """Slots that took the step."""
    evaluated: Mapping[Slot, Mapping[str, Tensor]]
    """Slots that were evaluated after the step, each with a copy of its parameters if the best are kept."""
    numbers: Callable[[], Tensor]
    """Wait for the numbers (`transfer.start_readback`): loss, norm of the rows and evaluation loss, [3, slots]."""

    def finish(self) -> None:
        """Wait for the numbers and add them to the slots' curves."""
        losses, norms, eval_losses = self.numbers().tolist()
        for slot in self.slots:
            eval_loss = eval_losses[slot.index] if slot in self.evaluated else None
            slot.add_step(losses[slot.index], norms[slot.index], eval_loss, self.evaluated.get(slot, {}))
