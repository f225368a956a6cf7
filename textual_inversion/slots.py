"""What goes into a slot of the engine, what it holds meanwhile, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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

GOOD_EVERY_STEPS = 100
"""Steps between states that a concept can go back to. By its own steps, so that a resume changes nothing."""

MAX_SETBACKS = 2
"""Times a concept goes back to its last good state before a loss that is not finite ends it."""

SETBACK_RATE = 0.1
"""What a setback multiplies a concept's learning rates by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """All that is needed to continue a concept exactly. No random state: draws are seeded by the step's number."""

    step: int
    parameters: Mapping[str, Tensor]
    """Name (`parameters.Layout`) -> [vectors, dim] float32; so are Adam's moments and the next two. On the CPU, but for
    a state that no one has asked for yet (`Slot.good`)."""
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    """The rows before the first step."""
    best: Mapping[str, Tensor]
    """The parameters when the loss on the frozen batch was least; empty unless `stop.keep_best`."""
    curve: Tensor
    """[step, 3] float32: step, loss, norm."""
    eval_losses: Tensor
    """[looks, 2] float32: step, loss on the frozen batch."""
    setbacks: int = 0
    """Times it went back to an earlier state, and learned more slowly from then on."""
    good: SlotState | None = None
    """Where it goes back to; None in a checkpoint of an older release, which then is that state itself."""

    @classmethod
    def beginning(cls, parameters: Mapping[str, Tensor]) -> SlotState:
        """Before the first step, with these parameters."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        return cls(
            step=0, parameters=parameters, exp_avg=zeros, exp_avg_sq=zeros, best={},
            start={name: tensor for name, tensor in parameters.items() if name != ADAPTER},
            curve=curve_tensor([]), eval_losses=eval_tensor([]),
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """As safetensors; equal states give equal bytes."""
        tensors = {"step": torch.tensor([self.step]), "curve": self.curve, "frozen_losses": self.eval_losses}
        tensors |= {f"{part}.{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}
        if self.setbacks:
            tensors["setbacks"] = torch.tensor([self.setbacks])
        if self.good is not None:  # its curve and start are part of this one's
            tensors["good.step"] = torch.tensor([self.good.step])
            parts = {part: getattr(self.good, part) for part in _OWN_PARTS}
            tensors |= {f"good.{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
        return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotState:
        """Raises ValueError if these are not the bytes of a slot's state."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        good: dict[str, dict[str, Tensor]] = {part: {} for part in _OWN_PARTS}
        try:
            tensors = load(data)
            step, curve, looks = int(tensors.pop("step")), tensors.pop("curve"), tensors.pop("frozen_losses")
            setbacks, good_step = tensors.pop("setbacks", None), tensors.pop("good.step", None)
            for name, tensor in tensors.items():
                into = parts if good_step is None or not name.startswith("good.") else good
                part, _, parameter = name.removeprefix("good." if into is good else "").partition(".")
                into[part][parameter] = tensor
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the checkpoint ({len(data)} bytes) is damaged: {error}; delete it") from error
        state = cls(
            step=step, parameters=parts["parameters"], exp_avg=parts["exp_avg"], exp_avg_sq=parts["exp_avg_sq"],
            start=parts["start"], best=parts["best"], curve=curve, eval_losses=looks, setbacks=int(setbacks or 0),
        )  # fmt: skip
        return state if good_step is None else replace(state, good=state.back_at(int(good_step), good))

    def into(self, groups: Mapping[str, ParameterGroup], place: int) -> None:
        """Put its parameters and moments in a slot."""
        for name, group in groups.items():
            group.put(place, self.parameters[name], self.exp_avg[name], self.exp_avg_sq[name])

    def cpu(self) -> SlotState:
        """The same on the CPU. What is there already is not copied."""
        return replace(
            self, parameters=on_cpu(self.parameters), exp_avg=on_cpu(self.exp_avg),
            exp_avg_sq=on_cpu(self.exp_avg_sq), best=on_cpu(self.best),
        )  # fmt: skip

    def back_at(self, step: int, parts: Mapping[str, Mapping[str, Tensor]]) -> SlotState:
        """What this was after an earlier step, given what has changed since: parameters, moments, the best."""
        return replace(
            self, step=step, curve=self.curve[:step],
            eval_losses=self.eval_losses[self.eval_losses[:, 0] <= step],
            parameters=parts["parameters"], exp_avg=parts["exp_avg"], exp_avg_sq=parts["exp_avg_sq"],
            best=parts["best"], good=None,
        )  # fmt: skip

    def check(self, shapes: Mapping[str, tuple[int, int]], rows: Mapping[str, tuple[int, int]]) -> None:
        """Raises BadInput unless it is of a concept whose parameters have these shapes, `rows` those of its rows."""
        if self.step != len(self.curve):
            raise BadInput(f"the checkpoint has {len(self.curve)} curve points for {self.step} steps; delete it")
        for part, expected in (
            (self.parameters, shapes), (self.exp_avg, shapes), (self.exp_avg_sq, shapes), (self.start, rows),
            (self.best, shapes if self.best else {}),
        ):  # fmt: skip
            if {name: tensor.shape for name, tensor in part.items()} != expected:
                raise BadInput("the checkpoint does not fit this concept and model; delete it to start anew")
        if self.good is not None:
            self.good.check(shapes, rows)


_OWN_PARTS = ("parameters", "exp_avg", "exp_avg_sq", "best")
_PARTS = (*_OWN_PARTS, "start")


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

    def check(self, layout: Layout) -> None:
        """Raise BadInput or NotFinite for what would fail later, or fail the neighbours too."""
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
            raise BadInput(f"init.method {method!r} chooses a start by the photos: hand one over from StartChooser")


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
    eval_losses: Tensor = field(default_factory=lambda: eval_tensor([]))
    """[looks, 2] float32: step, loss on the frozen batch; empty where nobody looked."""
    setbacks: int = 0
    """Times its loss was not finite, and it went on from an earlier state at a lower rate."""
    kind: ErrorKind | None = None
    """Kind of the error; None where there is none."""


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A concept that is being learned."""

    place: int
    """Where in the stacked parameters it is."""
    concept: Concept
    material: TrainingData
    """What its samples are drawn from."""
    num_vectors: Mapping[str, int]
    """Of each of its parameters, auxiliary rows included."""
    start: Mapping[str, Tensor]
    """Its rows before the first step."""
    step: int
    """Optimizer steps taken."""
    started: float
    curve: list[CurvePoint] = field(default_factory=list)
    """One point a step; may lag behind, as points are on their way from the accelerator for a while."""
    frozen: Batch | None = None
    """What every look is at; drawn for the first one, and after a resume the same again."""
    eval_losses: list[EvalLoss] = field(default_factory=list)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """Its parameters when the loss on the frozen batch was least; empty unless they are to be kept. On the device
    until a checkpoint has copied them; so is the next."""
    setbacks: int = 0
    good: SlotState | None = None
    """Where it goes back to if its loss is not finite."""
    error: str | None = None

    @property
    def rate(self) -> float:
        """What its learning rates are multiplied by."""
        return SETBACK_RATE**self.setbacks

    def goes_back(self, groups: Mapping[str, ParameterGroup]) -> bool:
        """After a step: true if its last loss was not finite and it is now what it was at the last good state, with
        lower rates; false if all is well, or that has been tried, or would be the same again."""
        if not self.error:
            if self.step % GOOD_EVERY_STEPS == 0:
                self.good = self._now(groups)
            return False
        good = self.good
        if good is None or self.setbacks == MAX_SETBACKS or len(self.curve) <= good.step + 1:
            return False
        good.into(groups, self.place)
        self.step, self.best, self.error = good.step, good.best, None
        self.curve, self.eval_losses = curve_points(good.curve), eval_points(good.eval_losses)
        self.setbacks += 1
        return True

    def note(self, loss: float, norm: float, eval_loss: float | None, looked_at: Mapping[str, Tensor]) -> None:
        """Add what a step came to: the next point, and the loss on the frozen batch if there was a look. `looked_at`:
        the parameters then, to be kept if none were better; or nothing.

        A point that is not finite is the concept's last, and its error.
        """
        if self.error:
            return
        step = len(self.curve) + 1
        self.curve.append(CurvePoint(step, loss, norm))
        if eval_loss is not None:
            if looked_at and eval_loss < self.best_eval.loss:
                self.best = looked_at
            self.eval_losses.append(EvalLoss(step, eval_loss))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            again = f", {self.setbacks} times at a lower rate" if self.setbacks else ""
            self.error = (
                f"loss or gradient was not finite at step {step} (loss {loss}{again}); lower inversion.learning_rate, "
                "or check the photos and the model's precision"
            )

    @property
    def best_eval(self) -> EvalLoss:
        """The look with the least finite loss; one at an infinite loss before the first."""
        finite = [look for look in self.eval_losses if math.isfinite(look.loss)]
        return min(finite, key=lambda look: look.loss, default=EvalLoss(0, math.inf))

    def parameters(self, groups: Mapping[str, ParameterGroup]) -> dict[str, Tensor]:
        """Copies of its parameters, on the device: name -> [vectors, dim]."""
        return {name: group.take(self.place, self.num_vectors[name])[0] for name, group in groups.items()}

    def state(self, groups: Mapping[str, ParameterGroup]) -> SlotState:
        """A copy of all it is, on the CPU. What changes no more is copied once, however often it is asked for."""
        self.best = on_cpu(self.best)
        self.good = self.good and self.good.cpu()
        now = self.good if self.good and self.good.step == self.step else self._now(groups).cpu()
        return replace(now, setbacks=self.setbacks, good=self.good)

    def _now(self, groups: Mapping[str, ParameterGroup]) -> SlotState:
        """A copy of all it is, on the device, but for where it goes back to."""
        parts = {name: group.take(self.place, self.num_vectors[name]) for name, group in groups.items()}
        return SlotState(
            step=self.step,
            parameters={name: values for name, (values, _, _) in parts.items()},
            exp_avg={name: exp_avg for name, (_, exp_avg, _) in parts.items()},
            exp_avg_sq={name: exp_avg_sq for name, (_, _, exp_avg_sq) in parts.items()},
            start=self.start,
            best=self.best,
            curve=curve_tensor(self.curve),
            eval_losses=eval_tensor(self.eval_losses),
            setbacks=self.setbacks,
        )


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is there already is not copied."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


class PendingReadback(NamedTuple):
    """What a step came to, on its way from the accelerator."""

    slots: list[Slot]
    """Those that took the step."""
    looked: Mapping[Slot, Mapping[str, Tensor]]
    """Those whose frozen batch was looked at then, each with a copy of its parameters if the best are to be kept."""
    numbers: Callable[[], Tensor]
    """[3, slots]: loss, norm of the rows, loss on the frozen batch (`transfer.start_readback`)."""

    def note(self) -> None:
        """Tell the slots. Waits until it is there."""
        losses, norms, eval_losses = self.numbers().tolist()
        for slot in self.slots:
            eval_loss = eval_losses[slot.place] if slot in self.looked else None
            slot.note(losses[slot.place], norms[slot.place], eval_loss, self.looked.get(slot, {}))


def curve_tensor(curve: Sequence[CurvePoint]) -> Tensor:
    """[n, 3] float32: step, loss, norm."""
    return torch.tensor(curve, dtype=torch.float32).reshape(-1, 3)


def curve_points(curve: Tensor) -> list[CurvePoint]:
    return [CurvePoint(int(step), loss, norm) for step, loss, norm in curve.tolist()]


def eval_tensor(looks: Sequence[EvalLoss]) -> Tensor:
    """[n, 2] float32: step, loss on the frozen batch."""
    return torch.tensor(looks, dtype=torch.float32).reshape(-1, 2)


def eval_points(looks: Tensor) -> list[EvalLoss]:
    return [EvalLoss(int(step), loss) for step, loss in looks.tolist()]
