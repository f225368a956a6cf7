"""Which passes are estimated anew when an actor gets other settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.actor import pass_estimates
from pipeline.actor.memory_plan import fit_learning
from pipeline.actor.pass_estimates import PassEstimates
from pipeline.config import RunConfig
from pipeline.gate_retries import retry_rules
from pipeline.model_actor import ModelActor
from pipeline.sample_config import GateConfig
from tests.pipeline.runs import BY_HAND, tiny_config, write_manifest
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import PassMemory

PLAIN = MemorySaving()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The estimates that are made, by their kind; none takes time."""
    made: list[str] = []

    def count(kind: str) -> None:
        def estimate(*_: object) -> PassMemory:
            made.append(kind)
            return PassMemory(weights=1, kept=1, peak=1)

        monkeypatch.setattr(pass_estimates, f"{kind}_memory", estimate)

    count("learning")
    count("drawing")
    return made


def estimates(backbone: Any = None) -> PassEstimates:
    return PassEstimates(backbone)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 7},
        {"learning_rate": 1.0, "learning_rate_schedule": "linear"},
        {"optimizer": "riemannian", "norm_control": "sphere"},
        {"max_grad_norm": 1.0, "weight_decay": 0.1},
        {"progressive": True, "templates": "textboost"},
    ],
)
def test_settings_of_the_same_pass_are_estimated_once(made: list[str], changes: dict[str, Any]) -> None:
    known = estimates()
    first = known.learning(PLAIN, InversionConfig(), 2, None)
    assert known.learning(PLAIN, InversionConfig(**changes), 2, None) is first
    assert made == ["learning"]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 5},
        {"gradient_path": "up_path"},
        {"adapter": AdapterConfig(kind="causal")},
        {"penalties": PenaltyConfig(clip=0.1)},
        {"text_encoders": ("clip_l",)},
    ],
)
def test_settings_of_another_pass_are_estimated_anew(made: list[str], changes: dict[str, Any]) -> None:
    known = estimates()
    known.learning(PLAIN, InversionConfig(), 2, None)
    known.learning(PLAIN, InversionConfig(**changes), 2, None)
    assert made == ["learning"] * 2


def test_other_ways_numbers_and_networks_are_estimated_anew(made: list[str]) -> None:
    known = estimates()
    config = InversionConfig()
    saving = MemorySaving(checkpoints_gradients=True)
    for _ in range(2):
        known.learning(PLAIN, config, 2, None)
        known.learning(saving, config, 2, None)
        known.learning(PLAIN, config, 3, None)
        known.learning(PLAIN, config, 2, lambda pixels: pixels)
        known.drawing(PLAIN, SamplingConfig())
        known.drawing(PLAIN, SamplingConfig(batch_size=3))
    assert made == ["learning"] * 4 + ["drawing"] * 2 + ["learning"]  # each function of pictures is another


def test_an_estimate_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = estimates()
    monkeypatch.setattr(pass_estimates, "drawing_memory", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            known.drawing(PLAIN, SamplingConfig())


@pytest.fixture
def ladder(tiny_model: Path, tmp_path: Path) -> list[RunConfig]:
    """The settings of a run and of its two rungs, on a machine that leaves the ways of saving memory open."""
    config = tiny_config(
        tiny_model,
        tmp_path / "out",
        manifest=str(write_manifest(tmp_path, ["toy"])),
        actors=dict.fromkeys(BY_HAND, "auto"),
    )
    config = replace(config, gate=GateConfig(ladder=("seed", "seed + steps*2")))
    return [config, *(rule.config for rule in retry_rules(config))]


def test_a_ladder_of_seeds_and_steps_is_estimated_once(
    made: list[str], ladder: list[RunConfig], tiny_backbone: Backbone
) -> None:
    known = estimates(tiny_backbone)
    plans = [fit_learning(known, config, 4, free=1e6) for config in ladder]
    assert made == ["learning", "drawing"]
    assert len({plan.description for plan in plans}) == 1
    tiny_backbone.save_memory(MemorySaving())


def test_an_actor_keeps_its_estimates_from_rung_to_rung(
    made: list[str], ladder: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.actor.memory_plan.free_bytes", lambda _device: 1e6)
    actor = ModelActor(ladder[0])
    for config in ladder:
        actor.prepare(config)
    actor.close()
    assert made == ["learning", "drawing"]
