"""Stacked AdamW against `torch.optim.AdamW` run for each concept by itself, bit for bit; DTI's step against the
released code's, written out for one row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from textual_inversion.config import InversionConfig, NormControl
from textual_inversion.optim import (
    ParameterGroup,
    adamw_,
    clip_gradients,
    control_norms,
    gradient_norms,
    rate_factor,
    riemannian_sgd_,
)

SLOTS, VECTORS, DIM = 3, 4, 32


FINITE = torch.ones(SLOTS, dtype=torch.bool)
FULL_RATE = torch.ones(SLOTS, dtype=torch.float64)
FIRST = torch.ones(SLOTS, 1, dtype=torch.int64)


def random_group(seed: int = 0, learning_rate: float = 5e-3, **options: object) -> ParameterGroup:
    group = ParameterGroup.zeros((SLOTS, VECTORS, DIM), torch.device("cpu"), learning_rate=learning_rate, **options)
    group.values.copy_(torch.randn(SLOTS, VECTORS, DIM, generator=torch.Generator().manual_seed(seed)))
    return group


def gradients(steps: int) -> Tensor:
    """Of very different sizes, as concepts' are."""
    generator = torch.Generator().manual_seed(9)
    sizes = torch.tensor([1e-6, 1.0, 1e4]).view(1, SLOTS, 1, 1)
    return torch.randn(steps, SLOTS, VECTORS, DIM, generator=generator) * sizes


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_equals_torch_optim_for_every_concept(weight_decay: float, max_grad_norm: float) -> None:
    config = InversionConfig()
    group, starts = random_group(weight_decay=weight_decay), (0, 3, 11)  # the step at which each concept comes in
    alone = [group.values[slot].clone().requires_grad_() for slot in range(SLOTS)]
    optimizers = [torch.optim.AdamW([rows], group.learning_rate, weight_decay=weight_decay) for rows in alone]

    for now, grad in enumerate(gradients(25)):
        counts = [max(now + 1 - start, 0) for start in starts]
        for slot, count in enumerate(counts):
            if count:
                alone[slot].grad = grad[slot].clone()
                if max_grad_norm:
                    torch.nn.utils.clip_grad_norm_([alone[slot]], max_grad_norm)
                optimizers[slot].step()
        if max_grad_norm:
            grad = clip_gradients({"a": grad}, gradient_norms({"a": grad}), max_grad_norm)["a"]
        adamw_(group, grad, torch.tensor(counts)[:, None], FULL_RATE, FINITE, config)

    for slot in range(SLOTS):
        if max_grad_norm:  # a norm over several rows may be summed in another order
            torch.testing.assert_close(group.values[slot], alone[slot].detach(), rtol=1e-5, atol=1e-6)
            continue
        assert torch.equal(group.values[slot], alone[slot].detach())
        adam = optimizers[slot].state[alone[slot]]
        assert torch.equal(group.exp_avg[slot], adam["exp_avg"])
        assert torch.equal(group.exp_avg_sq[slot], adam["exp_avg_sq"])


def test_a_vector_that_joins_later_is_as_new_as_a_concept_that_does() -> None:
    group, config = random_group(norm_control="clamp", norm=0.5), InversionConfig()
    first_steps = (0, 2, 5, 9)
    before = group.values.clone()
    alone = [before[1, vector].clone().requires_grad_() for vector in range(VECTORS)]
    optimizers = [torch.optim.AdamW([vector], group.learning_rate, weight_decay=0.0) for vector in alone]
    for now, grad in enumerate(gradients(8)):
        counts = [[0] * VECTORS, [max(now + 1 - first, 0) for first in first_steps], [now + 1] * VECTORS]
        adamw_(group, grad, torch.tensor(counts), FULL_RATE, FINITE, config)
        for vector, count in enumerate(counts[1]):
            if count:
                alone[vector].grad = grad[1, vector].clone()
                optimizers[vector].step()
                alone[vector].data = control_norms(alone[vector].data, "clamp", 0.5)
    for vector in range(3):
        torch.testing.assert_close(group.values[1, vector], alone[vector].detach())
    assert torch.equal(group.values[1, 3], before[1, 3])  # joins after step 9 and is not even clamped till then
    assert torch.equal(group.values[0], before[0])


@pytest.mark.parametrize("step", ["adamw", "riemannian"])
def test_a_slower_slot_moves_as_at_a_lower_learning_rate_and_no_other_does(step: str) -> None:
    def moved(learning_rate: float, lr_scales: Tensor) -> Tensor:
        group = random_group(learning_rate=learning_rate, weight_decay=0.1)
        for now, grad in enumerate(gradients(3)):
            if step == "adamw":
                adamw_(group, grad, FIRST + now, lr_scales, FINITE, InversionConfig())
            else:
                riemannian_sgd_(group, grad, FIRST, lr_scales, FINITE, torch.zeros(SLOTS, 1, DIM), 0.0)
        return group.values

    mixed = moved(0.04, torch.tensor([1.0, 0.25, 1.0], dtype=torch.float64))
    all_slow, all_fast = moved(0.01, FULL_RATE), moved(0.04, FULL_RATE)
    assert torch.equal(mixed[1], all_slow[1])
    assert torch.equal(mixed[[0, 2]], all_fast[[0, 2]])


@pytest.mark.parametrize("step", ["adamw", "riemannian"])
def test_a_slot_that_does_not_move_keeps_its_bytes_whatever_its_gradient(step: str) -> None:
    group, before = random_group(), random_group()
    grad = gradients(1)[0]
    grad[1] = torch.nan
    counts, is_finite = torch.tensor([[1], [1], [0]]), torch.tensor([True, False, True])
    if step == "adamw":
        adamw_(group, grad, counts, FULL_RATE, is_finite, InversionConfig())
    else:
        riemannian_sgd_(group, grad, counts, FULL_RATE, is_finite, torch.zeros(SLOTS, 1, DIM), 0.0)
    assert not torch.equal(group.values[0], before.values[0])
    for slot in (1, 2):
        assert torch.equal(group.values[slot], before.values[slot])
        assert group.exp_avg[slot].abs().sum() == 0
        assert group.exp_avg_sq[slot].abs().sum() == 0


def spherical_sgd(row: Tensor, grad: Tensor, mu: Tensor, rate: float, kappa: float, norm: float) -> Tensor:
    """Kim et al. 2026, Algorithm 1, for one row v = m u, in double precision."""
    u = row.double() / row.double().norm()
    g = norm * grad.double() - kappa * mu.double()
    g = g - (g @ u) * u
    g = g / g.norm()
    u = u - rate * g
    return norm * u / u.norm()


@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_riemannian_steps_equal_a_plain_reference(kappa: float) -> None:
    group = random_group(learning_rate=0.04, norm=0.4)
    expected = group.values.clone().double()
    mu = torch.nn.functional.normalize(torch.randn(SLOTS, VECTORS, DIM), dim=-1)
    mu[:, 2] = 0  # rows without a prior
    for grad in gradients(20):
        riemannian_sgd_(group, grad, FIRST, FULL_RATE, FINITE, mu, kappa)
        for slot in range(SLOTS):
            for vector in range(VECTORS):
                expected[slot, vector] = spherical_sgd(
                    expected[slot, vector], grad[slot, vector], mu[slot, vector], 0.04, kappa, 0.4
                )
    torch.testing.assert_close(group.values.double(), expected, rtol=0, atol=2e-6)


def test_riemannian_steps_keep_the_norm_and_turn_by_the_learning_rate() -> None:
    group, rate = random_group(learning_rate=0.04, norm=0.4), 0.04
    riemannian_sgd_(group, gradients(1)[0], FIRST, FULL_RATE, FINITE, torch.zeros(SLOTS, 1, DIM), 0.0)
    for grad in gradients(30):
        before = group.values.clone()
        riemannian_sgd_(group, grad, FIRST, FULL_RATE, FINITE, torch.zeros(SLOTS, 1, DIM), 0.0)
        assert (group.values.norm(dim=-1) - 0.4).abs().max() < 1e-6
        turned = torch.cosine_similarity(before.double(), group.values.double(), dim=-1).acos()
        torch.testing.assert_close(turned.tan(), torch.full_like(turned, rate), rtol=1e-3, atol=0)


def test_the_prior_alone_turns_rows_to_the_class() -> None:
    group = random_group(learning_rate=0.05, norm=0.4)
    mu = torch.nn.functional.normalize(torch.randn(SLOTS, 1, DIM), dim=-1)
    for _ in range(100):
        riemannian_sgd_(group, torch.zeros(SLOTS, VECTORS, DIM), FIRST, FULL_RATE, FINITE, mu, 1e-4)
    assert torch.cosine_similarity(group.values, mu.expand_as(group.values), dim=-1).min() > 0.99


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


def test_the_rows_rate_falls_as_in_the_released_code() -> None:
    """JMaiGC/textboost a806fda, train_textboost.py:1177-1184: after step s of 250, ratio (250 - s - 1) / 250."""
    released = [1.0, *((250 - step - 1) / 250 for step in range(249))]
    assert [rate_factor("linear", step, 250) for step in range(1, 251)] == pytest.approx(released)
    assert {rate_factor("constant", step, 250) for step in range(1, 251)} == {1.0}
