"""How an actor's model saves memory, by the free memory of its device."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.actor import memory_plan, pass_estimates
from pipeline.actor.memory_plan import LEARNING_SHARE, fit_drawing, fit_learning, free_bytes
from pipeline.actor.pass_estimates import PassEstimates
from pipeline.config import RunConfig
from tests.pipeline.runs import BY_HAND, tiny_config
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import PassMemory

CHECKPOINTS, SLICES, TILES = "checkpoints_gradients", "slices", "tiles"


AUTO = dict.fromkeys(BY_HAND, "auto")


class Watched:
    """A backbone of which only the ways of saving memory matter."""

    latent_shape = (4, 512, 512)
    """So large that no finite memory of a test is ample without an estimate."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.saving = MemorySaving()

    def save_memory(self, saving: MemorySaving) -> None:
        self.saving = saving


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A backbone whose passes take 100 bytes a concept, or 10 with checkpoints; 8 a picture, 2 of them at a time with
    slices; and half of that with tiles."""
    backbone = Watched()

    def learning(_backbone: object, _config: object, slots: int, _features: object) -> PassMemory:
        each = 10 if backbone.saving.checkpoints_gradients else 100
        return PassMemory(weights=1, kept=each * slots // 2, peak=each * slots)

    def drawing(_backbone: object, sampling: Any) -> PassMemory:
        at_once = 1 if backbone.saving.slices else sampling.batch_size
        return PassMemory(weights=1, kept=0, peak=(4 if backbone.saving.tiles else 8) * at_once)

    monkeypatch.setattr(pass_estimates, "learning_memory", learning)
    monkeypatch.setattr(pass_estimates, "drawing_memory", drawing)
    return backbone


def estimates_of(backbone: Any) -> PassEstimates:
    return PassEstimates(backbone)


def a_config(**actors: Any) -> RunConfig:
    return tiny_config("model", "out", actors=AUTO | actors)  # batches of 4 pictures


def plan(backbone: Any, config: RunConfig, slots: int, free: float) -> set[str]:
    """Return the ways in which memory is saved."""
    saving = fit_learning(estimates_of(backbone), config, slots, free=free).saving
    assert saving == backbone.saving
    return {way for way in (CHECKPOINTS, SLICES, TILES) if getattr(saving, way)}


def test_nothing_is_saved_where_all_fits(watched: Watched) -> None:
    assert plan(watched, a_config(), 2, math.inf) == set()
    assert plan(watched, a_config(), 2, 201 / LEARNING_SHARE) == set()


def test_memory_that_lacks_is_saved(watched: Watched) -> None:
    assert plan(watched, a_config(), 2, 199 / LEARNING_SHARE) == {CHECKPOINTS}
    assert plan(watched, a_config(), 1, 100) == {CHECKPOINTS, SLICES}  # 30 are left for four pictures of 8
    assert plan(watched, a_config(), 1, 7) == {CHECKPOINTS, SLICES, TILES}  # not one picture of 8


def test_settings_are_followed_whatever_is_free(watched: Watched) -> None:
    on = {"gradient_checkpointing": "on", "vae_slicing": "on", "vae_tiling": "on"}
    assert plan(watched, a_config(**on), 2, math.inf) == {CHECKPOINTS, SLICES, TILES}
    assert plan(watched, a_config(**BY_HAND), 2, 1) == set()
    found = fit_learning(estimates_of(watched), a_config(**BY_HAND | {"vae_slicing": "on"}), 2, free=5e9)
    assert found.description == "5 GB were free; used to save memory: slices"


def test_a_way_that_saves_nothing_is_not_taken(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    same = PassMemory(weights=1, kept=1, peak=100)
    monkeypatch.setattr(pass_estimates, "learning_memory", lambda *_: same)
    monkeypatch.setattr(pass_estimates, "drawing_memory", lambda *_: same)
    assert plan(watched, a_config(), 2, 1) == set()


@pytest.mark.parametrize(("free", "most"), [(1001, 7), (101 / LEARNING_SHARE, 1), (51 / LEARNING_SHARE, 5), (1, 1)])
def test_slots_are_bounded_by_the_estimate_on_a_gpu(watched: Watched, free: float, most: int) -> None:
    watched.device = torch.device("cuda")
    assert fit_learning(estimates_of(watched), a_config(), 1, free=free).most_slots == most
    assert fit_learning(estimates_of(watched), a_config(slots=3), 3, free=free).most_slots == math.inf


def test_drawing_alone_has_all_memory(watched: Watched) -> None:
    sampling = a_config().generation.sampling
    for free, saving in ((33 / LEARNING_SHARE, MemorySaving()), (31 / LEARNING_SHARE, MemorySaving(slices=True))):
        assert fit_drawing(estimates_of(watched), a_config(), sampling, free).saving == saving


def test_the_plan_is_said_in_one_line(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = fit_learning(estimates_of(watched), a_config(), 1, free=50e9)
    assert found.description == (
        "a learning pass of 2 samples keeps 2.5e-08 GB of each and takes 1e-07 GB beside 1e-09 GB of weights; "
        "a batch of 4 pictures takes 3.2e-08 GB; 50 GB were free; used to save memory: nothing"
    )
    assert [record.message for record in caplog.records] == [f"memory: {found.description}"]
    assert caplog.records[0].levelno == logging.INFO
    fit_learning(estimates_of(watched), a_config(vae_tiling="on"), 1, free=50e9)
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].message.endswith("used to save memory: tiles")


def test_a_model_without_an_estimate_runs_as_configured(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> PassMemory:
        raise NotImplementedError("no fake form of op\nand a trace")

    monkeypatch.setattr(pass_estimates, "learning_memory", fail)
    found = fit_learning(estimates_of(watched), a_config(vae_slicing="on"), 1, free=1)
    assert found.saving == watched.saving == MemorySaving(slices=True)
    assert found.most_slots == math.inf
    assert "no fake form of op" in found.description
    assert "memory cannot be estimated" in caplog.text


def test_a_model_learns_in_a_tenth_of_the_memory(tiny_backbone: Backbone, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, actors=AUTO)
    plenty = fit_learning(PassEstimates(tiny_backbone), config, 4, free=1e9)
    little = fit_learning(PassEstimates(tiny_backbone), config, 4, free=1e6)
    tiny_backbone.save_memory(MemorySaving())
    assert plenty.saving == MemorySaving()
    assert little.saving.checkpoints_gradients


def test_nothing_is_estimated_where_memory_is_ample(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the estimates were, no pass of models like these takes so much."""
    for name in ("learning_memory", "drawing_memory"):
        monkeypatch.delattr(pass_estimates, name)
    estimates = PassEstimates(tiny_backbone)
    found = fit_learning(estimates, a_config(), 4, free=1e15)
    assert found.saving == fit_drawing(estimates, a_config(), a_config().grid.sampling, free=1e15).saving
    assert found.saving == MemorySaving()
    values = math.prod(tiny_backbone.latent_shape)
    assert found.description == (
        f"a learning pass of 8 samples takes less than {8 * values * 2**20 / 1e9:.3g} GB; "
        f"a batch of 4 pictures takes less than {4 * values * 2**18 / 1e9:.3g} GB; "
        "1e+06 GB were free; used to save memory: nothing"
    )


@pytest.fixture
def group(tmp_path: Path) -> Path:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 200\n")
    return tmp_path


def test_a_containers_limit_bounds_what_is_free(group: Path) -> None:
    assert memory_plan._free_in_container(group) == 600
    (group / "memory.max").write_text("max\n")
    assert memory_plan._free_in_container(group) == math.inf
    assert memory_plan._free_in_container(group / "none") == math.inf
    assert free_bytes(torch.device("cpu")) > 2**20
