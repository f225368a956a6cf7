"""The works that the accelerator benchmark times, on a CPU: the default's budget and pictures are an actor's."""

from __future__ import annotations

import pytest

from benchmarks import gpu_works
from benchmarks.gpu_works import seconds_of_grid, seconds_of_initializer, time_engine
from pipeline.sample_config import GridConfig
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest


def test_pictures_are_those_that_an_actor_draws(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[ImageRequest]] = []

    def note(_backbone: Backbone, requests: list[ImageRequest], config: SamplingConfig) -> None:
        assert config == GridConfig().sampling
        drawn.append(requests)

    monkeypatch.setattr(gpu_works, "generate", note)
    assert seconds_of_grid(tiny_backbone, 1) >= 0
    assert seconds_of_initializer(tiny_backbone, 2) >= 0
    own, initial = drawn[0], drawn[-1]
    assert drawn == [own, own, initial, initial, initial]  # the first of each is not counted
    assert len(own) == len(initial) == len(GridConfig().prompts) * GridConfig().images_per_prompt
    assert all(request.embeddings for request in own)
    assert {request.prompt for request in initial} == {each.replace("{}", "cat") for each in GridConfig().prompts}


def test_all_slots_learn_in_all_steps(tiny_backbone: Backbone) -> None:
    assert time_engine(tiny_backbone, InversionConfig(steps=2, batch_size=1), 2, "cpu").rate > 0
