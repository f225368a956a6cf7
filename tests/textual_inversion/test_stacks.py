from __future__ import annotations

import torch
from torch import Tensor

from tests.toy_backbone import DIMS, ToyBackbone
from textual_inversion.config import InversionConfig
from textual_inversion.parameters import Layout
from textual_inversion.slot_state import SlotState
from textual_inversion.stacks import Stacks

BACKBONE = ToyBackbone()


def stacks(num_slots: int = 3) -> Stacks:
    return Stacks(Layout.from_config(BACKBONE, InversionConfig(), max_vectors=4), num_slots)


def rows(num_vectors: int, norm: float) -> dict[str, Tensor]:
    """Rows that all have this norm."""
    return {key: torch.full((num_vectors, dim), norm / dim**0.5) for key, dim in DIMS.items()}


def class_vectors(value: float) -> dict[str, Tensor]:
    return {key: torch.full((dim,), value) for key, dim in DIMS.items()}


def test_what_is_written_to_a_slot_is_read_from_it_and_from_no_other() -> None:
    stack = stacks()
    stack.write(1, SlotState.initial(rows(2, norm=3.0)), class_vectors(1.0))
    leaves = stack.leaves(torch.tensor([1, 0]))
    for key, dim in DIMS.items():
        assert torch.equal(leaves[key][0, :2], rows(2, norm=3.0)[key])
        assert leaves[key][0, 2:].abs().sum() == 0
        assert leaves[key][1].tolist() == [[0.0] * dim] * 4
        assert leaves[key].requires_grad


def test_a_slot_that_is_refilled_keeps_nothing_of_the_concept_before() -> None:
    stack, once = stacks(), stacks()
    stack.write(1, SlotState.initial(rows(4, norm=3.0)), class_vectors(2.0))
    for each in (stack, once):
        each.write(1, SlotState.initial(rows(1, norm=5.0)), class_vectors(-1.0))
    index, used = torch.tensor([1]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    ids = {key: torch.zeros(2, 4, dtype=torch.long) for key in DIMS}
    refilled, fresh = (each.trained(each.leaves(index), index, ids, used) for each in (stack, once))
    for key in DIMS:
        assert torch.equal(refilled.rows[key], fresh.rows[key])
        assert torch.equal(refilled.start[key], fresh.start[key])
        assert torch.equal(refilled.class_vector[key], fresh.class_vector[key])


def test_the_mean_norm_is_of_the_rows_in_use() -> None:
    stack = stacks(num_slots=2)
    stack.write(0, SlotState.initial(rows(2, norm=3.0)), class_vectors(1.0))
    long, short = DIMS
    unequal = {long: rows(1, norm=2.0)[long], short: rows(1, norm=4.0)[short]}
    stack.write(1, SlotState.initial(unequal), class_vectors(1.0))
    is_placeholder_row = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    torch.testing.assert_close(stack.mean_norms(is_placeholder_row), torch.tensor([3.0, 3.0]))
    assert stack.mean_norms(torch.zeros(2, 4)).tolist() == [0.0, 0.0]


def test_class_directions_have_norm_1_or_are_zero() -> None:
    stack = stacks(num_slots=2)
    stack.write(0, SlotState.initial(rows(1, norm=1.0)), class_vectors(-4.0))
    for key, dim in DIMS.items():
        expected = torch.stack([torch.full((1, dim), -(dim**-0.5)), torch.zeros(1, dim)])
        torch.testing.assert_close(stack.class_directions(key), expected)
