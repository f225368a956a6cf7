"""Optimizer steps of parameters stacked [slots, vectors, dim], and control of the norms of rows.

Every operation works element by element or within one slot, so a slot's result does not depend on its neighbours.
AdamW equals `torch.optim.AdamW` on that slot's vectors alone, bit for bit.

Both optimizer steps share three arguments:

- `step_counts`: number of steps that have trained each vector, the present one included; [slots, vectors], or
  [slots, 1] where all vectors of a slot are alike; int64 on the CPU. A vector of count 0 stays as it is.
- `lr_scales`: factor on each slot's learning rate, [slots] float64 on the CPU; 1, or less after a rollback.
- `is_finite`: slots whose loss and gradient are finite, [slots] bool. All other slots stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.config import InversionConfig, NormControl, RateSchedule
from textual_inversion.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """One parameter of all slots with Adam's moments, and the settings of its optimizer steps.

    The tensors are [slots, vectors, dim] float32 and are changed in place. A concept with fewer vectors leaves the rest
    of its slot at zero.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    learning_rate: float
    weight_decay: float
    norm_control: NormControl
    norm: float
    """Norm at which norm control holds the vectors."""

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        norm_control: NormControl = "none",
        norm: float = 1.0,
    ) -> ParameterGroup:
        """Make a group of empty slots; `shape` is (slots, vectors, dim)."""
        values, exp_avg, exp_avg_sq = torch.zeros(3, *shape, device=device)
        return cls(
            values=values,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            norm_control=norm_control,
            norm=norm,
        )

    def write(self, slot_index: int, values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Fill a slot with one concept's tensors, each [vectors, dim], from the CPU or the group's device."""
        for stack, vectors in ((self.values, values), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            stack[slot_index] = 0
            stack[slot_index, : len(vectors)] = to_device(vectors, stack.device)

    def read(self, slot_index: int, num_vectors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copy a slot's values, exp_avg and exp_avg_sq, each [num_vectors, dim], on the group's device."""
        stacks = (self.values, self.exp_avg, self.exp_avg_sq)
        values, exp_avg, exp_avg_sq = (stack[slot_index, :num_vectors].clone() for stack in stacks)
        return values, exp_avg, exp_avg_sq


def adamw_(
    group: ParameterGroup,
    grad: Tensor,
    step_counts: Tensor,
    lr_scales: Tensor,
    is_finite: Tensor,
    config: InversionConfig,
) -> None:
    """Take one AdamW step in place (Loshchilov & Hutter 2019, Algorithm 2), then apply norm control.

    The bias of Adam's moments (Kingma & Ba 2015, section 3) is corrected by each vector's own step count.
    """
    # Corrections are computed in double precision on the host and rounded once, as torch.optim does.
    learning_rate = group.learning_rate * lr_scales[:, None]
    correction1 = _bias_corrections(step_counts, config.adam_beta1)
    correction2 = _bias_corrections(step_counts, config.adam_beta2, power=0.5)
    step_size = _column(-learning_rate / correction1, grad)
    denominator = _column(correction2, grad)
    decay = _column(1 - learning_rate * group.weight_decay, grad)

    exp_avg = group.exp_avg.lerp(grad, 1 - config.adam_beta1)
    exp_avg_sq = (group.exp_avg_sq * config.adam_beta2).addcmul_(grad, grad, value=1 - config.adam_beta2)
    values = group.values * decay
    values = values + step_size * exp_avg / ((exp_avg_sq.sqrt() / denominator) + config.adam_epsilon)
    values = control_norms(values, group.norm_control, group.norm)

    moves = _moves(step_counts, is_finite)
    for old, new in ((group.values, values), (group.exp_avg, exp_avg), (group.exp_avg_sq, exp_avg_sq)):
        old.copy_(torch.where(moves, new, old))


def riemannian_sgd_(
    group: ParameterGroup,
    grad: Tensor,
    step_counts: Tensor,
    lr_scales: Tensor,
    is_finite: Tensor,
    prior_direction: Tensor,
    prior_weight: float,
) -> None:
    """Take one step of Riemannian SGD on the unit sphere in place (DTI: Kim et al. 2026, section 4, Algorithm 1).

    A row v = m u keeps its magnitude m = `group.norm`. Its direction u moves by `learning_rate` radians down the
    gradient of the loss with a von Mises-Fisher prior: `prior_direction` is the prior's mu, [slots, vectors or 1, dim]
    of norm 1, or zero for a vector without a prior; `prior_weight` is its kappa. The released code divides by a running
    mean of gradient norms; that is left out, as in the paper's own experiments (beta = 0).
    """
    u = control_norms(group.values, "sphere", 1.0)
    g = group.norm * grad - prior_weight * prior_direction  # dL/du = m dL/dv
    g = g - (g * u).sum(-1, keepdim=True) * u
    angle = _column(group.learning_rate * lr_scales[:, None], grad)
    u = control_norms(u - angle * control_norms(g, "sphere", 1.0), "sphere", 1.0)
    group.values.copy_(torch.where(_moves(step_counts, is_finite), group.norm * u, group.values))


def control_norms(rows: Tensor, control: NormControl, norm: float) -> Tensor:
    """Limit the norms of rows [..., dim] to those the text encoder was trained with; else learned norms grow far away.

    `clamp`: at most `norm` (TextBoost, with the vocabulary's mean norm). `sphere`: exactly `norm`; zero stays zero.
    """
    if control == "none":
        return rows
    scale: Tensor = norm / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows * (scale.clamp(max=1) if control == "clamp" else scale)


def rate_factor(schedule: RateSchedule, step: int, steps: int) -> float:
    """Return the factor on the rows' learning rate at the step `step` of `steps`, counted from 1.

    `linear` is the decay of TextBoost's release (a806fda, train_textboost.py:1178-1184): 1 at the first step, 1 / steps
    at the last.
    """
    return 1.0 if schedule == "constant" else 1 - (step - 1) / steps


def gradient_norms(grads: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each concept's gradient over all its parameters: [slots, vectors, dim] each -> [slots]."""
    # Vector by vector first: how one long sum is cut among threads would depend on the number of slots.
    squares = torch.stack([grad.square().sum(-1).sum(-1) for grad in grads.values()], dim=1)
    return squares.sum(1).sqrt()


def clip_gradients(grads: Mapping[str, Tensor], norms: Tensor, max_norm: float) -> dict[str, Tensor]:
    """Scale each concept's gradient so that its norm is at most `max_norm`; 0 clips nothing.

    `norms` [slots] come from `gradient_norms`. The factor is that of `torch.nn.utils.clip_grad_norm_`.
    """
    if not max_norm:
        return dict(grads)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)[:, None, None]
    return {name: grad * factors for name, grad in grads.items()}


def _bias_corrections(step_counts: Tensor, beta: float, power: float = 1.0) -> Tensor:
    """Return (1 - beta ** n) ** power of each step count n, in float64.

    Python's power function is used, as in torch.optim: a vectorised one may round in another way.
    """
    counts = step_counts.clamp(min=1).tolist()
    return torch.tensor([[(1 - beta**n) ** power for n in slot] for slot in counts], dtype=torch.float64)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Move values [slots, vectors or 1] to the device and precision of `like`; -> [slots, vectors or 1, 1]."""
    return to_device(values.to(like.dtype), like.device)[..., None]


def _moves(step_counts: Tensor, is_finite: Tensor) -> Tensor:
    """Return which vectors change in a step, [slots, vectors or 1, 1] bool."""
    return to_device(step_counts > 0, is_finite.device)[..., None] & is_finite[:, None, None]
