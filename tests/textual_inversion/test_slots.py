from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from textual_inversion.concept import Concept
from textual_inversion.slots import Slot, SlotState, curve_points, curve_tensor, eval_points, eval_tensor
from textual_inversion.stopping import CurvePoint, EvalLoss
from textual_inversion.training_data import TrainingData

PARTS = ("parameters", "exp_avg", "exp_avg_sq", "start", "best")


def state() -> SlotState:
    curve = curve_tensor([CurvePoint(1, 0.1, 0.4), CurvePoint(2, 0.3, 0.5)])
    parts = {part: {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 4)} for part in PARTS}
    return SlotState(step=2, curve=curve, eval_losses=eval_tensor([EvalLoss(1, 0.25)]), **parts)


def test_bytes_and_back() -> None:
    before = state()
    after = SlotState.from_bytes(before.to_bytes())
    assert after.step == 2
    assert torch.equal(after.curve, before.curve)
    assert eval_points(after.eval_losses) == [EvalLoss(1, 0.25)]
    for name in PARTS:
        parts = getattr(before, name)
        assert {k: v.tolist() for k, v in getattr(after, name).items()} == {k: v.tolist() for k, v in parts.items()}
    assert after.to_bytes() == before.to_bytes()


def test_the_beginning_comes_back_too() -> None:
    rows = {"clip_l": torch.randn(2, 8)}
    after = SlotState.from_bytes(SlotState.beginning(rows).to_bytes())
    assert torch.equal(after.start["clip_l"], rows["clip_l"])
    assert torch.equal(after.parameters["clip_l"], rows["clip_l"])
    assert after.exp_avg["clip_l"].abs().sum() == 0
    assert after.best == {}
    assert after.eval_losses.shape == (0, 2)


def test_the_last_good_state_comes_back_too() -> None:
    now = replace(state(), setbacks=1)
    earlier = {part: {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 4)} for part in PARTS if part != "start"}
    now = replace(now, good=now.back_at(1, earlier))
    after = SlotState.from_bytes(now.to_bytes())
    assert after.to_bytes() == now.to_bytes()
    assert after.setbacks == 1
    assert after.good is not None
    assert after.good.step == len(after.good.curve) == 1
    assert torch.equal(after.good.exp_avg["clip_g"], earlier["exp_avg"]["clip_g"])
    assert torch.equal(after.good.start["clip_l"], now.start["clip_l"])
    assert eval_points(after.good.eval_losses) == [EvalLoss(1, 0.25)]


def test_another_versions_bytes() -> None:
    tensors = {"step": torch.tensor([1]), "curve": torch.ones(1, 3), "frozen_losses": torch.ones(0, 2)}
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged: 'rows'"):
        SlotState.from_bytes(save({**tensors, "rows.clip_l": torch.ones(1, 8)}))


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda _: b"", lambda _: b"{}" * 40])
def test_damaged_bytes(damage: object) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged"):
        SlotState.from_bytes(damage(state().to_bytes()))  # type: ignore[operator]


def test_an_empty_curve() -> None:
    assert curve_tensor([]).shape == (0, 3)
    assert curve_points(curve_tensor([])) == []


def test_the_first_point_that_is_not_finite_is_the_last() -> None:
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("x",))
    material = TrainingData(
        moments=torch.empty(0), mask=None, features=None, prompts=torch.empty(0), plain=torch.empty(0), per_image=None,
        joins=(0,),
    )  # fmt: skip
    slot = Slot(place=0, concept=concept, material=material, num_vectors={}, start={}, step=3, started=0.0)
    for loss in (0.5, math.inf, 0.5):
        slot.note(loss, 1.0, 0.25, {})
    assert [point.step for point in slot.curve] == [1, 2]
    assert [look.step for look in slot.eval_losses] == [1, 2]
    assert slot.error
    assert "not finite at step 2 (loss inf)" in slot.error
