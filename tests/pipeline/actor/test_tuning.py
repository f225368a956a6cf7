"""How an actor sets itself up for its device."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.actor import tuning
from pipeline.actor.tuning import Pass, compile_where_wanted, default_slots, drawing_pass, passes_to_learn
from tests.pipeline.runs import tiny_config
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone


def test_all_kinds_of_passes_that_an_actor_makes_are_named(tiny_backbone: Backbone, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, inversion={"batch_size": 3}, grid={"sampling": {"batch_size": 5}})
    learning = [Pass(6, gradients=True), Pass(10, gradients=False)]
    assert passes_to_learn(tiny_backbone, config, slots=2) == learning
    looking = tiny_config(
        tmp_path, tmp_path, inversion={"batch_size": 3, "stop": {"keep_best": True}},
        grid={"sampling": {"batch_size": 5}},
    )  # fmt: skip
    assert passes_to_learn(tiny_backbone, looking, slots=2) == [*learning, Pass(3, gradients=False)]
    assert drawing_pass(tiny_backbone, SamplingConfig(batch_size=5, guidance_scale=1)) == Pass(5, gradients=False)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 8), (2, 4), (3, 2), (4, 2), (16, 1)])
def test_on_a_cpu_slots_fill_a_batch_of_8_samples(tiny_backbone: Backbone, batch_size: int, expected: int) -> None:
    assert default_slots(tiny_backbone, InversionConfig(batch_size=batch_size), None) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"), [("auto", []), ("off", []), ("on", ["checked"]), ("graphs", ["checked, graphs"])]
)
def test_the_denoiser_is_compiled_where_that_is_asked_for(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, expected: list[str]
) -> None:
    """On a CPU `auto` leaves it as it is."""
    done: list[str] = []
    monkeypatch.setattr(
        tuning, "compile_checked", lambda *_, graphs: done.append("checked, graphs" if graphs else "checked")
    )
    monkeypatch.setattr(tuning, "compile_fastest", lambda *_: done.append("fastest"))
    config = tiny_config(tmp_path, tmp_path, actors={"compile": wanted})
    compile_where_wanted(tiny_backbone, config, [Pass(1, gradients=True)])
    assert done == expected
