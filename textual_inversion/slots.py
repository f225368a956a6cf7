"""What enters a slot of the engine (`Assignment`), is held there (`Slot`, `SlotState`) and leaves it (`Outcome`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.errors import BadInput, ErrorKind, NotFinite
from textual_inversion.latents import Views
from textual_inversion.objective import Batch
from textual_inversion.optim import ParameterGroup
from textual_inversion.parameters import ADAPTER, Layout, num_photos
from textual_inversion.stopping import CurvePoint, EvalLoss
from textual_inversion.training_data import TrainingData

LAST_GOOD_EVERY_STEPS = 100
"""Steps of a concept between two states that it can roll back to. Its own steps count, so a resume changes nothing."""

MAX_ROLLBACKS = 2
"""Most rollbacks of a concept; the next loss that is not finite ends it."""

ROLLBACK_LR_SCALE = 0.1
"""Factor on a concept's learning rates for each rollback."""

_CHANGING_PARTS = ("parameters", "exp_avg", "exp_avg_sq", "best")
_PARTS = (*_CHANGING_PARTS, "start")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """Everything needed to continue a concept exactly. Draws are seeded by step, so there is no random state.

    Mappings go from parameter name (`parameters.Layout`) to a tensor [vectors, dim] float32. Tensors are on the CPU,
    except those of a `Slot.last_good` that no checkpoint has asked for yet.
    """

    step: int
    """Optimizer steps taken."""
    parameters: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    """Adam's first moments."""
    exp_avg_sq: Mapping[str, Tensor]
    """Adam's second moments."""
    start: Mapping[str, Tensor]
    """Rows before the first step."""
    best: Mapping[str, Tensor]
    """Parameters at the lowest evaluation loss; empty unless `stop.keep_best`."""
    curve: Tensor
    """Step, loss and norm of each step, [step, 3] float32."""
    eval_losses: Tensor
    """Step and loss of each evaluation, [evaluations, 2] float32."""
    setbacks: int = 0
    """Number of rollbacks. Each lowered the learning rates by `ROLLBACK_LR_SCALE`."""
    last_good: SlotState | None = None
    """State to roll back to. None in a checkpoint of an older release: then this state itself."""

    @classmethod
    def initial(cls, parameters: Mapping[str, Tensor]) -> SlotState:
        """Make the state before the first step from the initial parameters."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        return cls(
            step=0,
            parameters=parameters,
            exp_avg=zeros,
            exp_avg_sq=zeros,
            start={name: tensor for name, tensor in parameters.items() if name != ADAPTER},
            best={},
            curve=curve_tensor([]),
            eval_losses=eval_tensor([]),
        )

    def to_bytes(self) -> bytes:
        """Write the state in safetensors format; equal states give equal bytes."""
        numbers = {"step": torch.tensor([self.step]), "curve": self.curve, "frozen_losses": self.eval_losses}
        if self.setbacks:
            numbers["setbacks"] = torch.tensor([self.setbacks])
        groups: dict[str, Mapping[str, Tensor]] = {"": numbers, **{part: getattr(self, part) for part in _PARTS}}
        if self.last_good is not None:  # its curve and its start are contained in this state's
            groups["good"] = {"step": torch.tensor([self.last_good.step])}
            groups |= {f"good.{part}": getattr(self.last_good, part) for part in _CHANGING_PARTS}
        return save({name: tensor.contiguous().clone() for name, tensor in flatten(groups).items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotState:
        """Read what `to_bytes` wrote. Raises ValueError if the bytes are not those of a state."""
        try:
            groups = unflatten(load(data))
            numbers, good = groups.pop(""), groups.pop("good", {})
            parts: dict[str, Any] = {part: groups.pop(part, {}) for part in _PARTS}
            state = cls(
                step=int(numbers.pop("step")),
                curve=numbers.pop("curve"),
                eval_losses=numbers.pop("frozen_losses"),
                setbacks=int(numbers.pop("setbacks", 0)),
                **parts,
            )
            if good:
                parts = {part: groups.pop(f"good.{part}", {}) for part in _CHANGING_PARTS}
                state = replace(state, last_good=state.at_step(int(good.pop("step")), parts))
            if unknown := [*numbers, *good, *groups]:
                raise KeyError(unknown[0])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the checkpoint ({len(data)} bytes) is damaged: {error}; delete it") from error
        return state

    def at_step(self, step: int, parts: Mapping[str, Mapping[str, Tensor]]) -> SlotState:
        """Return the concept's state after an earlier step, with that step's parameters, moments and best parameters.

        The rest is known from this state: the start does not change, curves only grow.
        """
        changed: dict[str, Any] = dict(parts)
        is_earlier = self.eval_losses[:, 0] <= step
        return replace(
            self,
            step=step,
            curve=self.curve[:step],
            eval_losses=self.eval_losses[is_earlier],
            last_good=None,
            **changed,
        )

    def write_to(self, groups: Mapping[str, ParameterGroup], slot_index: int) -> None:
        """Write the parameters and moments to a slot of the stacks."""
        for name, group in groups.items():
            group.write(slot_index, self.parameters[name], self.exp_avg[name], self.exp_avg_sq[name])

    def to_cpu(self) -> SlotState:
        """Return the state with all tensors on the CPU; those already there are not copied."""
        moved: dict[str, Any] = {part: to_cpu(getattr(self, part)) for part in _CHANGING_PARTS}
        return replace(self, **moved)

    def check(self, shapes: Mapping[str, tuple[int, int]], rows: Mapping[str, tuple[int, int]]) -> None:
        """Raise BadInput unless all parameters have these shapes, and the start the shapes of `rows`."""
        if self.step != len(self.curve):
            raise BadInput(f"the checkpoint has {len(self.curve)} curve points for {self.step} steps; delete it")
        expected = {**dict.fromkeys(_CHANGING_PARTS, shapes), "start": rows, "best": shapes if self.best else {}}
        for part in _PARTS:
            if {name: tensor.shape for name, tensor in getattr(self, part).items()} != expected[part]:
                raise BadInput("the checkpoint does not fit this concept and model; delete it to start anew")
        if self.last_good is not None:
            self.last_good.check(shapes, rows)


def flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by "group.name", those of the group "" by their name alone."""
    return {
        f"{group}.{name}" if group else name: tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo `flatten`: a group's name may contain dots, a tensor's name must not."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = tensor
    return groups


@dataclass(frozen=True, slots=True)
class Assignment:
    """A concept for a slot, with its photos already encoded."""

    concept: Concept
    views: Views
    """The encoded photos, from `latents.encode_views`."""
    state: SlotState | None = None
    """State to continue from; None starts anew."""
    start: LearnedEmbedding | None = None
    """Rows, and their adapter, to start from; None starts from the concept's initializer."""

    def check(self, layout: Layout) -> None:
        """Raise BadInput or NotFinite if the assignment would fail later, or make its neighbours fail."""
        moments, backbone = self.views.moments, layout.backbone
        shapes = layout.shapes(self.concept, num_photos(self.views))
        wanted = (2, *backbone.latent_shape)
        if moments.ndim != 5 or moments.shape[0] == 0 or moments.shape[1:] != wanted:
            raise BadInput(f"moments have shape {tuple(moments.shape)}; this model needs [views, {wanted}]")
        if not moments.isfinite().all():
            raise NotFinite("the photos' latents are not finite; check the photos and the autoencoder's precision")
        if self.state is not None:
            self.state.check(shapes, {name: shape for name, shape in shapes.items() if name in backbone.token_tables})
        elif (method := layout.config.init.method) != "words" and self.start is None:
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


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A concept that is being learned."""

    index: int
    """Index of the slot in the stacked parameters."""
    concept: Concept
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
    counts = torch.zeros(len(slots), num_rows, dtype=torch.int64)
    for slot in slots:
        if slot is not None:
            counts[slot.index] = slot.step
            first_steps = torch.tensor(slot.data.first_steps)
            counts[slot.index, : len(first_steps)] = (slot.step - first_steps).clamp(min=0)
    return counts


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


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors to the CPU; those already there are not copied."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def curve_tensor(curve: Sequence[CurvePoint]) -> Tensor:
    """Return a curve as [steps, 3] float32: step, loss, norm."""
    return torch.tensor(curve, dtype=torch.float32).reshape(-1, 3)


def curve_points(curve: Tensor) -> list[CurvePoint]:
    """Undo `curve_tensor`."""
    return [CurvePoint(int(step), loss, norm) for step, loss, norm in curve.tolist()]


def eval_tensor(eval_losses: Sequence[EvalLoss]) -> Tensor:
    """Return evaluation losses as [evaluations, 2] float32: step, loss."""
    return torch.tensor(eval_losses, dtype=torch.float32).reshape(-1, 2)


def eval_points(eval_losses: Tensor) -> list[EvalLoss]:
    """Undo `eval_tensor`."""
    return [EvalLoss(int(step), loss) for step, loss in eval_losses.tolist()]
