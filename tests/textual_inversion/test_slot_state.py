from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from textual_inversion.slot_state import (
    SlotState,
    curve_points,
    curve_tensor,
    eval_points,
    eval_tensor,
    flatten,
    unflatten,
)
from textual_inversion.stopping import CurvePoint, EvalLoss

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
    after = SlotState.from_bytes(SlotState.initial(rows).to_bytes())
    assert torch.equal(after.start["clip_l"], rows["clip_l"])
    assert torch.equal(after.parameters["clip_l"], rows["clip_l"])
    assert after.exp_avg["clip_l"].abs().sum() == 0
    assert after.best == {}
    assert after.eval_losses.shape == (0, 2)


def test_the_last_good_state_comes_back_too() -> None:
    now = replace(state(), setbacks=1)
    earlier = {part: {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 4)} for part in PARTS if part != "start"}
    now = replace(now, last_good=now.at_step(1, earlier))
    after = SlotState.from_bytes(now.to_bytes())
    assert after.to_bytes() == now.to_bytes()
    assert after.setbacks == 1
    assert after.last_good is not None
    assert after.last_good.step == len(after.last_good.curve) == 1
    assert torch.equal(after.last_good.exp_avg["clip_g"], earlier["exp_avg"]["clip_g"])
    assert torch.equal(after.last_good.start["clip_l"], now.start["clip_l"])
    assert eval_points(after.last_good.eval_losses) == [EvalLoss(1, 0.25)]


def numbered(start: float, **shapes: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {name: start + torch.arange(float(rows * dim)).view(rows, dim) for name, (rows, dim) in shapes.items()}


ROWS = {"bert": (2, 3), "clip_l": (2, 4)}
CHECKPOINT = {
    "step": torch.tensor([2]),
    "curve": torch.tensor([[1.0, 0.5, 0.25], [2.0, 0.125, 0.0625]]),
    "frozen_losses": torch.tensor([[1.0, 0.75], [2.0, 0.875]]),
    "setbacks": torch.tensor([1]),
    **{f"parameters.{name}": tensor for name, tensor in numbered(1, **ROWS, adapter=(1, 8)).items()},
    **{f"exp_avg.{name}": tensor for name, tensor in numbered(2, **ROWS, adapter=(1, 8)).items()},
    **{f"exp_avg_sq.{name}": tensor for name, tensor in numbered(3, **ROWS, adapter=(1, 8)).items()},
    **{f"best.{name}": tensor for name, tensor in numbered(4, **ROWS, adapter=(1, 8)).items()},
    **{f"start.{name}": tensor for name, tensor in numbered(5, **ROWS).items()},
    "good.step": torch.tensor([1]),
    **{f"good.parameters.{name}": tensor for name, tensor in numbered(6, **ROWS, adapter=(1, 8)).items()},
    **{f"good.exp_avg.{name}": tensor for name, tensor in numbered(7, **ROWS, adapter=(1, 8)).items()},
    **{f"good.exp_avg_sq.{name}": tensor for name, tensor in numbered(8, **ROWS, adapter=(1, 8)).items()},
    **{f"good.best.{name}": tensor for name, tensor in numbered(9, **ROWS, adapter=(1, 8)).items()},
}
"""A checkpoint as it lies in a store: its keys are a file format."""


def test_the_keys_of_a_checkpoint() -> None:
    state = SlotState.from_bytes(save(CHECKPOINT))
    assert (state.step, state.setbacks) == (2, 1)
    assert torch.equal(state.parameters["adapter"], 1 + torch.arange(8.0).view(1, 8))
    assert torch.equal(state.exp_avg["bert"], 2 + torch.arange(6.0).view(2, 3))
    assert set(state.start) == {"bert", "clip_l"}
    assert state.last_good is not None
    assert (state.last_good.step, state.last_good.curve.tolist()) == (1, [[1.0, 0.5, 0.25]])
    assert torch.equal(state.last_good.exp_avg_sq["clip_l"], 8 + torch.arange(8.0).view(2, 4))
    assert state.last_good.eval_losses.tolist() == [[1.0, 0.75]]
    assert state.to_bytes() == save(CHECKPOINT)


def test_an_older_checkpoint_has_no_state_to_roll_back_to() -> None:
    older = {name: t for name, t in CHECKPOINT.items() if not name.startswith(("good.", "best.", "setbacks"))}
    state = SlotState.from_bytes(save(older))
    assert (state.setbacks, state.last_good, state.best) == (0, None, {})
    assert state.to_bytes() == save(older)


@pytest.mark.parametrize("key", ["good.step", "step", "curve", "frozen_losses"])
def test_a_checkpoint_without_one_of_its_numbers(key: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged"):
        SlotState.from_bytes(save({name: tensor for name, tensor in CHECKPOINT.items() if name != key}))


def test_flatten_and_back() -> None:
    groups = {"": {"step": torch.ones(1)}, "good": {"step": torch.ones(2)}, "good.best": {"clip_l": torch.ones(3)}}
    flat = flatten(groups)
    assert list(flat) == ["step", "good.step", "good.best.clip_l"]
    assert unflatten(flat) == groups


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
