"""AdamW over rows stacked [slots, vectors, dim], and control of their norms.

Every operation is element by element or within one slot, so a slot's result does not depend on its neighbours, and
equals `torch.optim.AdamW` on that slot's rows alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.config import InversionConfig, NormControl


@dataclass(frozen=True, kw_only=True, slots=True)
class RowState:
    """One text encoder's rows in all slots, with Adam's moments: each [slots, vectors, dim] float32, changed in place.
    A concept with fewer vectors leaves the rest of its slot at zero."""

    rows: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def zeros(cls, slots: int, vectors: int, dim: int, device: torch.device) -> RowState:
        rows, exp_avg, exp_avg_sq = torch.zeros(3, slots, vectors, dim, device=device)
        return cls(rows=rows, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def put(self, slot: int, rows: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Fill a slot with one concept's: each [num_vectors, dim]."""
        for stack, part in ((self.rows, rows), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            stack[slot] = 0
            stack[slot, : len(part)] = part

    def take(self, slot: int, num_vectors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies on the CPU of a slot's rows and moments: each [num_vectors, dim]."""
        stacks = (self.rows, self.exp_avg, self.exp_avg_sq)
        rows, exp_avg, exp_avg_sq = (stack[slot, :num_vectors].clone().cpu() for stack in stacks)
        return rows, exp_avg, exp_avg_sq


def adamw_(
    state: RowState, grad: Tensor, steps: Sequence[int], moving: Tensor, mean_norm: float, config: InversionConfig
) -> None:
    """One step of Loshchilov & Hutter 2019, Algorithm 2, then norm control, of the slots where `moving` [slots] holds.

    `steps`: each slot's own count of steps, this one included, for Adam's bias correction.
    """
    beta1, beta2 = config.adam_beta1, config.adam_beta2
    # Corrections are worked out in double precision on the host and rounded once, as torch.optim does.
    counts = [max(step, 1) for step in steps]
    scale = _column([-config.learning_rate / (1 - beta1**n) for n in counts], grad)
    root = _column([(1 - beta2**n) ** 0.5 for n in counts], grad)

    exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
    exp_avg_sq = (state.exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    rows = state.rows * (1 - config.learning_rate * config.weight_decay)
    rows = rows + scale * exp_avg / ((exp_avg_sq.sqrt() / root) + config.adam_epsilon)
    rows = control_norms(rows, config.norm_control, mean_norm)

    chosen = moving[:, None, None]
    for old, new in ((state.rows, rows), (state.exp_avg, exp_avg), (state.exp_avg_sq, exp_avg_sq)):
        old.copy_(torch.where(chosen, new, old))


def control_norms(rows: Tensor, control: NormControl, mean_norm: float) -> Tensor:
    """Keep rows [..., dim] where the text encoder knows vectors to be; without it learned norms run away.

    `clamp`: at most the vocabulary's mean norm (TextBoost). `sphere`: exactly that norm.
    """
    if control == "none":
        return rows
    scale: Tensor = mean_norm / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows * (scale.clamp(max=1) if control == "clamp" else scale)


def gradient_norms(grads: Mapping[str, Tensor]) -> Tensor:
    """Each concept's own gradient norm over all its rows and text encoders: [slots, vectors, dim] each -> [slots]."""
    squares = torch.cat([grad.square().sum(-1) for grad in grads.values()], dim=1)
    return squares.sum(1).sqrt()


def clip_scales(norms: Tensor, max_norm: float) -> Tensor:
    """What to multiply each concept's gradient by so that its norm is at most `max_norm`, as
    `torch.nn.utils.clip_grad_norm_` does -> [slots, 1, 1]."""
    return (max_norm / (norms + 1e-6)).clamp(max=1)[:, None, None]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]
