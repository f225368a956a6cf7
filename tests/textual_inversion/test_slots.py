from __future__ import annotations

import math

import pytest
import torch

from textual_inversion.concept import Concept
from textual_inversion.slots import Slot, SlotState, curve_points, curve_tensor
from textual_inversion.stopping import CurvePoint


def state() -> SlotState:
    rows = {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 4)}
    curve = curve_tensor([CurvePoint(1, 0.1, 0.4), CurvePoint(2, 0.3, 0.5)])
    return SlotState(
        step=2, rows=rows, exp_avg={k: -r for k, r in rows.items()}, exp_avg_sq={k: r * r for k, r in rows.items()},
        curve=curve,
    )  # fmt: skip


def test_bytes_and_back() -> None:
    before = state()
    after = SlotState.from_bytes(before.to_bytes())
    assert after.step == 2
    assert torch.equal(after.curve, before.curve)
    for name in ("rows", "exp_avg", "exp_avg_sq"):
        parts = getattr(before, name)
        assert {k: v.tolist() for k, v in getattr(after, name).items()} == {k: v.tolist() for k, v in parts.items()}
    assert after.to_bytes() == before.to_bytes()


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda _: b"", lambda _: b"{}" * 40])
def test_damaged_bytes(damage: object) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged"):
        SlotState.from_bytes(damage(state().to_bytes()))  # type: ignore[operator]


def test_an_empty_curve() -> None:
    assert curve_tensor([]).shape == (0, 3)
    assert curve_points(curve_tensor([])) == []


def test_the_first_point_that_is_not_finite_is_the_last() -> None:
    concept = Concept(concept_id="c", placeholder_token="<c>", images=("x",))
    slot = Slot(place=0, concept=concept, moments=torch.empty(0), prompts=torch.empty(0), step=3, started=0.0)
    for loss in (0.5, math.inf, 0.5):
        slot.note(loss, 1.0)
    assert [point.step for point in slot.curve] == [1, 2]
    assert slot.error
    assert "not finite at step 2 (loss inf)" in slot.error
