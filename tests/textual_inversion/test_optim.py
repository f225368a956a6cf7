"""Stacked AdamW against `torch.optim.AdamW` run for each concept by itself, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from textual_inversion.config import InversionConfig, NormControl
from textual_inversion.optim import RowState, adamw_, clip_scales, control_norms, gradient_norms

SLOTS, VECTORS, DIM = 3, 4, 32


def random_state(seed: int = 0) -> RowState:
    state = RowState.zeros(SLOTS, VECTORS, DIM, torch.device("cpu"))
    state.rows.copy_(torch.randn(SLOTS, VECTORS, DIM, generator=torch.Generator().manual_seed(seed)))
    return state


def gradients(steps: int) -> Tensor:
    """Of very different sizes, as concepts' are."""
    generator = torch.Generator().manual_seed(9)
    sizes = torch.tensor([1e-6, 1.0, 1e4]).view(1, SLOTS, 1, 1)
    return torch.randn(steps, SLOTS, VECTORS, DIM, generator=generator) * sizes


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_equals_torch_optim_for_every_concept(weight_decay: float, max_grad_norm: float) -> None:
    config = InversionConfig(norm_control="none", weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    state, starts = random_state(), (0, 3, 11)  # the step at which each concept comes in
    alone = [state.rows[slot].clone().requires_grad_() for slot in range(SLOTS)]
    optimizers = [torch.optim.AdamW([rows], config.learning_rate, weight_decay=weight_decay) for rows in alone]

    for now, grad in enumerate(gradients(25)):
        steps = [max(now + 1 - start, 0) for start in starts]
        moving = torch.tensor(steps) > 0
        for slot in range(SLOTS):
            if moving[slot]:
                alone[slot].grad = grad[slot].clone()
                if max_grad_norm:
                    torch.nn.utils.clip_grad_norm_([alone[slot]], max_grad_norm)
                optimizers[slot].step()
        if max_grad_norm:
            grad = grad * clip_scales(gradient_norms({"a": grad}), max_grad_norm)
        adamw_(state, grad, steps, moving, 1.0, config)

    for slot in range(SLOTS):
        if max_grad_norm:  # a norm over several rows may be summed in another order
            torch.testing.assert_close(state.rows[slot], alone[slot].detach(), rtol=1e-5, atol=1e-6)
            continue
        assert torch.equal(state.rows[slot], alone[slot].detach())
        adam = optimizers[slot].state[alone[slot]]
        assert torch.equal(state.exp_avg[slot], adam["exp_avg"])
        assert torch.equal(state.exp_avg_sq[slot], adam["exp_avg_sq"])


def test_a_slot_that_does_not_move_keeps_its_bytes_whatever_its_gradient() -> None:
    state, before = random_state(), random_state()
    grad = gradients(1)[0]
    grad[1] = torch.nan
    adamw_(state, grad, [1, 1, 0], torch.tensor([True, False, False]), 1.0, InversionConfig())
    assert not torch.equal(state.rows[0], before.rows[0])
    for slot in (1, 2):
        assert torch.equal(state.rows[slot], before.rows[slot])
        assert state.exp_avg[slot].abs().sum() == 0
        assert state.exp_avg_sq[slot].abs().sum() == 0


def test_gradient_norms_span_rows_and_text_encoders() -> None:
    grads = {"a": torch.randn(SLOTS, VECTORS, 8), "b": torch.randn(SLOTS, VECTORS, 5)}
    expected = [torch.cat([grads["a"][slot].flatten(), grads["b"][slot].flatten()]).norm() for slot in range(SLOTS)]
    torch.testing.assert_close(gradient_norms(grads), torch.stack(expected))


@pytest.mark.parametrize(("control", "expected"), [("none", [0.5, 3.0]), ("clamp", [0.5, 2.0]), ("sphere", [2.0, 2.0])])
def test_norm_control(control: NormControl, expected: list[float]) -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, DIM), dim=1) * torch.tensor([[0.5], [3.0]])
    controlled = control_norms(rows, control, 2.0)
    torch.testing.assert_close(controlled.norm(dim=1), torch.tensor(expected))
    torch.testing.assert_close(torch.cosine_similarity(controlled, rows), torch.ones(2))


@pytest.mark.parametrize("control", ["clamp", "sphere"])
def test_empty_rows_stay_zero(control: NormControl) -> None:
    assert torch.equal(control_norms(torch.zeros(1, DIM), control, 2.0), torch.zeros(1, DIM))


def test_clamp_leaves_smaller_rows_bit_for_bit() -> None:
    rows = torch.randn(5, DIM) * 0.01
    assert torch.equal(control_norms(rows, "clamp", 1.0), rows)
