"""How many slots a device gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.toy_backbone import ToyBackbone
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig
from textual_inversion.engine import Engine
from textual_inversion.training_data import TrainingData
from textual_inversion.trial import choose_slots, samples_per_second


@pytest.mark.parametrize(
    ("rates", "slots"),
    [
        ({1: 100, 2: 180, 4: 300, 8: 305, 16: 600}, 4),  # twice the slots hardly help
        ({1: 100, 2: 190, 4: 370}, 4),  # 8 do not fit
        ({1: 100, 2: 101}, 1),
        ({1: 100, 2: 200, 4: 400, 8: 800, 16: 1600, 32: 3200}, 16),  # as many as are allowed
        ({1: 100}, 1),
    ],
)
def test_slots_are_doubled_while_that_helps_and_fits(rates: Mapping[int, float], slots: int) -> None:
    def rate(slots: int) -> float:
        if slots not in rates:
            raise torch.OutOfMemoryError
        return rates[slots]

    assert choose_slots(rate, at_most=16) == slots


def test_a_model_that_does_not_fit_at_all() -> None:
    def rate(_slots: int) -> float:
        raise torch.OutOfMemoryError("nothing fits")

    with pytest.raises(torch.OutOfMemoryError):
        choose_slots(rate, at_most=16)


@pytest.mark.parametrize(
    "config",
    [
        InversionConfig(),
        InversionConfig(adapter=AdapterConfig(kind="lora"), penalties=PenaltyConfig(knowledge=0.1)),
        InversionConfig(progressive=True, steps=30),
    ],
    ids=["rows", "textboost", "progressive"],
)
def test_the_rate_is_of_the_real_engine(monkeypatch: pytest.MonkeyPatch, config: InversionConfig) -> None:
    backbone, batches = ToyBackbone(), []
    predict = backbone.predict

    def spy(noisy: torch.Tensor, *rest: object) -> torch.Tensor:
        batches.append(len(noisy))
        return predict(noisy, *rest)

    monkeypatch.setattr(backbone, "predict", spy)
    assert samples_per_second(backbone, config, 3) > 0
    assert set(batches) == {3 * config.batch_size}


def test_only_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what an engine does once, such as encoding captions: that would be held against few slots most."""
    backbone, events = ToyBackbone(), []
    predict = backbone.predict

    def note(event: str, then: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            events.append(event)
            return then(*arguments, **options)

        return noting

    monkeypatch.setattr(backbone, "predict", note("step", predict))
    monkeypatch.setattr("textual_inversion.trial.Engine", note("engine", Engine))
    monkeypatch.setattr(TrainingData, "from_views", note("concept", TrainingData.from_views))
    monkeypatch.setattr("textual_inversion.trial.time", SimpleNamespace(perf_counter=note("clock", time.perf_counter)))
    samples_per_second(backbone, InversionConfig(), 2)
    steps = ["step"] * 4
    assert events == ["engine", "concept", "concept", *steps, "clock", "clock", *steps, "clock"]
