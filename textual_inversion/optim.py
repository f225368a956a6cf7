"""How parameters stacked [slots, vectors, dim] move in a step, and control of the rows' norms.

Every operation is element by element or within one slot, so a slot's result does not depend on its neighbours; AdamW
equals `torch.optim.AdamW` on that slot's vectors alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.config import InversionConfig, NormControl
from textual_inversion.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """One of the parameters in all slots, with Adam's moments, each [slots, vectors, dim] float32 and changed in place,
    and what is its own about its steps. A concept with fewer vectors leaves the rest of its slot at zero."""

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    learning_rate: float
    weight_decay: float
    norm_control: NormControl
    norm: float
    """Where norm control holds its vectors."""

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
        """`shape`: (slots, vectors, dim)."""
        values, exp_avg, exp_avg_sq = torch.zeros(3, *shape, device=device)
        return cls(
            values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, learning_rate=learning_rate,
            weight_decay=weight_decay, norm_control=norm_control, norm=norm,
        )  # fmt: skip

    def put(self, slot: int, values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Fill a slot with one concept's: each [vectors, dim], on the CPU or the same device."""
        for stack, part in ((self.values, values), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            stack[slot] = 0
            stack[slot, : len(part)] = to_device(part, stack.device)

    def take(self, slot: int, vectors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of a slot's values and moments, on the same device: each [vectors, dim]."""
        stacks = (self.values, self.exp_avg, self.exp_avg_sq)
        values, exp_avg, exp_avg_sq = (stack[slot, :vectors].clone() for stack in stacks)
        return values, exp_avg, exp_avg_sq


Ages = Sequence[Sequence[int]]
"""Slot -> one number for all its vectors, or one for each: in how many steps it has been trained, this one included.
0 leaves it as it is."""


Rates = Sequence[float]
"""Slot -> what its learning rate is multiplied by: 1, or less after a setback."""


def adamw_(
    group: ParameterGroup, grad: Tensor, ages: Ages, rates: Rates, sound: Tensor, config: InversionConfig
) -> None:
    """One step of Loshchilov & Hutter 2019, Algorithm 2, then norm control, of the slots where `sound` [slots] holds.

    Bias is corrected by a vector's own age.
    """
    beta1, beta2 = config.adam_beta1, config.adam_beta2
    # Corrections are worked out in double precision on the host and rounded once, as torch.optim does.
    counts = [[max(age, 1) for age in slot] for slot in ages]
    paces = [group.learning_rate * rate for rate in rates]
    scale = _column([[-pace / (1 - beta1**n) for n in slot] for pace, slot in zip(paces, counts, strict=True)], grad)
    root = _column([[(1 - beta2**n) ** 0.5 for n in slot] for slot in counts], grad)

    exp_avg = group.exp_avg.lerp(grad, 1 - beta1)
    exp_avg_sq = (group.exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    values = group.values * _column([[1 - pace * group.weight_decay] for pace in paces], grad)
    values = values + scale * exp_avg / ((exp_avg_sq.sqrt() / root) + config.adam_epsilon)
    values = control_norms(values, group.norm_control, group.norm)

    moving = _moving(ages, sound)
    for old, new in ((group.values, values), (group.exp_avg, exp_avg), (group.exp_avg_sq, exp_avg_sq)):
        old.copy_(torch.where(moving, new, old))


def riemannian_(
    group: ParameterGroup,
    grad: Tensor,
    ages: Ages,
    rates: Rates,
    sound: Tensor,
    direction: Tensor,
    direction_prior: float,
) -> None:
    """One step of DTI (Kim et al. 2026, section 4): rows v = m u keep their magnitude m = `group.norm`; the direction
    u moves by `learning_rate` radians on the unit sphere, down the gradient of the loss with a von Mises-Fisher prior.

    `direction` [slots, vectors, dim] is the prior's mu, of norm 1, or zero for a vector without; `direction_prior` its
    kappa. The released code's running mean of gradient norms is left out, as in its own experiments (beta = 0).
    """
    u = control_norms(group.values, "sphere", 1.0)
    g = group.norm * grad - direction_prior * direction  # dL/du = m dL/dv
    g = g - (g * u).sum(-1, keepdim=True) * u
    paces = _column([[group.learning_rate * rate] for rate in rates], grad)
    u = control_norms(u - paces * control_norms(g, "sphere", 1.0), "sphere", 1.0)
    group.values.copy_(torch.where(_moving(ages, sound), group.norm * u, group.values))


def control_norms(rows: Tensor, control: NormControl, norm: float) -> Tensor:
    """Keep rows [..., dim] where the text encoder knows vectors to be; without it learned norms run away.

    `clamp`: at most `norm` (TextBoost, at the vocabulary's mean). `sphere`: exactly `norm`; zero stays zero.
    """
    if control == "none":
        return rows
    scale: Tensor = norm / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows * (scale.clamp(max=1) if control == "clamp" else scale)


def gradient_norms(grads: Mapping[str, Tensor]) -> Tensor:
    """Each concept's own gradient norm over all its parameters: [slots, vectors, dim] each -> [slots]."""
    # Vector by vector first: how one long sum is cut among threads would depend on the number of slots.
    squares = torch.stack([grad.square().sum(-1).sum(-1) for grad in grads.values()], dim=1)
    return squares.sum(1).sqrt()


def clip_scales(norms: Tensor, max_norm: float) -> Tensor:
    """What to multiply each concept's gradient by so that its norm is at most `max_norm`, as
    `torch.nn.utils.clip_grad_norm_` does -> [slots, 1, 1]."""
    return (max_norm / (norms + 1e-6)).clamp(max=1)[:, None, None]


def join_steps(steps: int, num_vectors: int) -> tuple[int, ...]:
    """Gal et al. 2022, section 5, "progressive": of k vectors the i-th (from 0) joins after i / k of the steps. (The
    paper's second joins at 2,000 steps and its third at 4,000.)"""
    return tuple(-(-vector * steps // num_vectors) for vector in range(num_vectors))


def _column(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[slots, vectors or 1, 1]"""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[..., None]


def _moving(ages: Ages, sound: Tensor) -> Tensor:
    return to_device(torch.tensor(ages) > 0, sound.device)[..., None] & sound[:, None, None]
