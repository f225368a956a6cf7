"""Muon (Jordan et al. 2024), momentum with orthogonalised updates of matrices; vectors take AdamW.

Muon needs fewer steps than AdamW here, and steps, not samples, are scarce on a two-core CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ADAM_BETAS = (0.9, 0.99)
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
)
"""Coefficients of quintic iterations towards the polar factor, steep ones first."""


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return roughly the nearest (semi-)orthogonal matrix (rows, columns): its singular values are about 1.

    Every iteration is x <- p(x x^T) x, so the polynomials are multiplied on the smaller side and applied once.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() * 1.01 + 1e-7)
    gram = x @ x.T
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = identity
    for a, b, c in _COEFFICIENTS:
        polynomial = torch.addmm(a * identity + b * gram, gram, gram, alpha=c)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.T if is_tall else x


def parameter_groups(module: nn.Module, *, matrix_lr: float, vector_lr: float) -> list[dict]:
    """Split a module: hidden matrices and convolutions to Muon; vectors, embeddings and thin layers to AdamW."""
    matrices = []
    vectors = []
    for name, parameter in module.named_parameters():
        is_hidden = parameter.ndim >= 2 and "embedding" not in name.split("time_")[0]
        is_hidden = is_hidden and min(parameter.shape[0], parameter[0].numel()) >= 16
        (matrices if is_hidden else vectors).append(parameter)
    return [
        {"params": matrices, "lr": matrix_lr, "is_matrix": True},
        {"params": vectors, "lr": vector_lr, "is_matrix": False},
    ]


class Muon(torch.optim.Optimizer):
    """Optimizer with orthogonalised Nesterov momentum for groups with `is_matrix`, and AdamW for the others."""

    def __init__(self, groups: list[dict], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "is_matrix": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._matrix_update if group["is_matrix"] else self._vector_update
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = update(parameter, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _matrix_update(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        flat = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        # Scale updates to the size that AdamW's have (Liu et al. 2025): root mean square 0.2 for any shape.
        return (orthogonalise(flat) * (0.2 * max(flat.shape) ** 0.5)).view_as(parameter)

    def _vector_update(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        first = state.setdefault("first", torch.zeros_like(parameter))
        second = state.setdefault("second", torch.zeros_like(parameter))
        state["count"] = state.get("count", 0) + 1
        first.lerp_(parameter.grad, 1 - _ADAM_BETAS[0])
        second.lerp_(parameter.grad.square(), 1 - _ADAM_BETAS[1])
        corrected = second / (1 - _ADAM_BETAS[1] ** state["count"])
        return first / (1 - _ADAM_BETAS[0] ** state["count"]) / (corrected.sqrt() + 1e-8)
