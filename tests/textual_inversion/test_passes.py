from __future__ import annotations

import torch

from tests.textual_inversion.test_slots import slot
from tests.toy_backbone import ToyBackbone
from textual_inversion.config import InversionConfig
from textual_inversion.parameters import Layout
from textual_inversion.passes import Passes
from textual_inversion.stacks import Stacks


def passes(num_slots: int, size: int) -> Passes:
    layout = Layout.from_config(ToyBackbone(), InversionConfig(batch_size=1), max_vectors=3)
    return Passes(layout, Stacks(layout, num_slots), num_slots=num_slots, size=size, seed=0, image_features=None)


def test_the_last_pass_is_padded_with_copies_of_its_first() -> None:
    a, b, c = (slot(index) for index in range(3))
    assert passes(3, 2).cut([a, b, c]) == [[a, b], [c, c]]
    assert passes(3, 3).cut([b]) == [[b, b, b]]
    assert passes(3, 1).cut([a, c]) == [[a], [c]]


def test_values_are_spread_over_the_slots_without_the_padding() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    spread = passes(4, 3).by_slot([slot(3), slot(1)], values)
    assert spread.tolist() == [[0, 0], [3, 4], [0, 0], [1, 2]]


def test_rows_count_that_the_next_prompts_use() -> None:
    found = passes(3, 1).is_placeholder_row([slot(0, step=4, first_steps=(0, 3, 5)), None, slot(2)])
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
