"""The state of a concept between two steps, and the bytes of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textual_inversion.errors import BadCheckpoint, first_line
from textual_inversion.optim import ParameterGroup
from textual_inversion.parameters import ADAPTER
from textual_inversion.stopping import CurvePoint, EvalLoss

_CHANGING_PARTS = ("parameters", "exp_avg", "exp_avg_sq", "best")
_PARTS = (*_CHANGING_PARTS, "start")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """State from which a concept continues exactly. Draws are seeded by step, so there is no random state.

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
            numbers = groups.pop("")
            good = groups.pop("good", {})
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
            raise ValueError(
                f"the checkpoint ({len(data)} bytes) is damaged: {first_line(error)}; delete it"
            ) from error
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
        """Raise BadCheckpoint unless all parameters have these shapes, and the start the shapes of `rows`."""
        if self.step != len(self.curve):
            raise BadCheckpoint(f"the checkpoint has {len(self.curve)} curve points for {self.step} steps; delete it")
        expected = {**dict.fromkeys(_CHANGING_PARTS, shapes), "start": rows, "best": shapes if self.best else {}}
        for part in _PARTS:
            if {name: tensor.shape for name, tensor in getattr(self, part).items()} != expected[part]:
                raise BadCheckpoint("the checkpoint does not fit this concept and model; delete it to start anew")
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
