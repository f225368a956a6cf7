from __future__ import annotations

import math

import torch

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.slots import Slot, step_counts
from textual_inversion.stopping import stop_rule_from_config
from textual_inversion.training_data import TrainingData

CONFIG = InversionConfig()


def slot(index: int = 0, step: int = 3, first_steps: tuple[int, ...] = (0,)) -> Slot:
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("x",))
    none = torch.empty(0)
    data = TrainingData(
        moments=none,
        mask=None,
        features=None,
        prompts=none,
        list_index=none,
        photo_list_index=None,
        first_steps=first_steps,
    )
    return Slot(
        index=index,
        concept=concept,
        config=CONFIG,
        stop_rule=stop_rule_from_config(CONFIG),
        data=data,
        num_vectors={},
        start={},
        step=step,
        started=0.0,
    )


def test_the_first_point_that_is_not_finite_is_the_last() -> None:
    one = slot()
    for loss in (0.5, math.inf, 0.5):
        one.add_step(loss, 1.0, 0.25, {})
    assert [point.step for point in one.curve] == [1, 2]
    assert [evaluation.step for evaluation in one.eval_losses] == [1, 2]
    assert one.error
    assert "not finite at step 2 (loss inf)" in one.error


def test_rows_that_become_active_later_have_fewer_steps() -> None:
    slots = [slot(0, step=4, first_steps=(0, 3, 5)), None, slot(2, step=2)]
    assert step_counts(slots, 4).tolist() == [[4, 1, 0, 4], [0, 0, 0, 0], [2, 2, 2, 2]]
