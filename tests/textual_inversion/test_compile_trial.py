"""The trial of ways to run the denoiser: what computes something else is not used, nor what is slower."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toy_backbone import ALPHAS_CUMPROD, HashedWords
from textual_inversion import compile_trial
from textual_inversion.compile_trial import Mode, Pass, Timing, compile_checked, compile_fastest, time_pass
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import SamplingConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.noise import Epsilon


def twice(module: Any, _inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler that errs."""
    return lambda *args: [2 * output for output in module(*args)]


@pytest.fixture
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(str(tiny_model), device="cpu", precision="float32")


def test_a_compiler_that_errs_is_not_used(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    request, sampling = [ImageRequest("a cat", 1)], SamplingConfig(steps=1, batch_size=1)
    (before,) = generate(backbone, request, sampling)
    passes = [Pass(2, gradients=True)]
    with caplog.at_level(logging.WARNING, "textual_inversion"):
        assert not compile_checked(backbone, passes, backend=twice, or_plain=True)  # type: ignore[arg-type]
    assert "changes what the denoiser computes by" in caplog.text
    (after,) = generate(backbone, request, sampling)
    assert after.tobytes() == before.tobytes()
    with pytest.raises(RuntimeError, match="changes what the denoiser computes"):
        compile_checked(backbone, passes, backend=twice)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_model_learns_and_draws_the_same(backbone: Backbone, tiny_backbone: Backbone) -> None:
    """By torch's own compiler, with gradients through the frozen network; on a CPU there are no graphs to record."""
    assert compile_checked(backbone, [Pass(2, gradients=True), Pass(2, gradients=False)], graphs=True)
    sampling = SamplingConfig(steps=2, batch_size=1)
    (ours,), (plain,) = (generate(each, [ImageRequest("a cat", 1)], sampling) for each in (backbone, tiny_backbone))
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), plain.tobytes(), strict=True)) <= 2


class Denoiser:
    """As much of a backbone as is asked for here: predicts the text's mean, and in some modes what is wrong."""

    device, dtype, latent_shape = torch.device("cpu"), torch.float32, (4, 2, 2)
    noise, vocabularies = Epsilon(ALPHAS_CUMPROD, {}), {"words": HashedWords(max_length=2)}

    def __init__(self, *wrong: tuple[Mode, Pass], fails: Mode | None = None) -> None:
        self.mode: Mode = "plain"
        self._wrong, self._fails = wrong, fails

    def compile(self, *, graphs: bool = False, **_: Any) -> None:
        self.mode = "graphs" if graphs else "compiled"

    def uncompile(self) -> None:
        self.mode = "plain"

    def encode_prompts(self, ids: dict[str, Tensor], _rows: object) -> Conditioning:
        return Conditioning(hidden=1 + ids["words"][..., None].float())

    def predict(self, noisy: Tensor, _timesteps: Tensor, text: Conditioning) -> Tensor:
        if self.mode == self._fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        is_wrong = (self.mode, Pass(len(noisy), text.hidden.requires_grad)) in self._wrong
        return noisy * text.hidden.mean((1, 2))[:, None, None, None] * (2 if is_wrong else 1)


def fastest(denoiser: Denoiser, passes: list[Pass], *timings: tuple[float, float]) -> Mode:
    left = [Timing(*timing) for timing in timings]
    mode = compile_fastest(denoiser, passes, measure=lambda *_: left.pop(0))  # type: ignore[arg-type]
    assert (denoiser.mode, left) == (mode, [])
    return mode


LEARN, DRAW = Pass(4, gradients=True), Pass(2, gradients=False)


@pytest.mark.parametrize("wrong", [LEARN, DRAW, None])
def test_every_kind_of_pass_is_checked(wrong: Pass | None) -> None:
    denoiser = Denoiser(*[("compiled", wrong)] if wrong else [])  # type: ignore[list-item]
    assert compile_checked(denoiser, [LEARN, DRAW], or_plain=True) is (wrong is None)  # type: ignore[arg-type]
    assert denoiser.mode == ("plain" if wrong else "compiled")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([(4.0, 1.0), (2.0, 1.0)], "compiled"),
        ([(4.0, 1.0), (3.95, 1.0)], "plain"),
        ([(4.0, 4.0), (2.0, 2.0), (1.0, 0.1)], "graphs"),
        ([(4.0, 4.0), (2.0, 2.0), (1.99, 0.1)], "compiled"),
        ([(4.0, 4.0), (5.0, 4.5), (3.0, 0.1)], "graphs"),
        ([(4.0, 4.0), (5.0, 4.5), (4.5, 0.1)], "plain"),
    ],
)
def test_the_fastest_way_is_taken_and_graphs_only_where_launching_takes_the_time(
    seconds: list[tuple[float, float]], expected: Mode
) -> None:
    assert fastest(Denoiser(), [LEARN, DRAW], *seconds) == expected


def test_what_errs_or_cannot_be_done_is_not_the_fastest(caplog: pytest.LogCaptureFixture) -> None:
    by_launches = [(4.0, 4.0), (2.0, 2.0)]
    assert fastest(Denoiser(("compiled", DRAW)), [LEARN, DRAW], by_launches[0]) == "plain"
    assert fastest(Denoiser(("graphs", DRAW)), [LEARN, DRAW], *by_launches) == "compiled"
    assert "no CUDA graphs" not in caplog.text
    assert fastest(Denoiser(fails="graphs"), [LEARN, DRAW], *by_launches) == "compiled"
    assert "no CUDA graphs: OutOfMemoryError: CUDA out of memory" in caplog.text


def test_graphs_are_not_tried_where_torch_ties_them_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_trial, "graphs_work_in_threads", lambda: False)
    assert fastest(Denoiser(), [LEARN, DRAW], (4.0, 4.0), (2.0, 2.0)) == "compiled"


def test_passes_are_timed() -> None:
    timing = time_pass(Denoiser(), LEARN)  # type: ignore[arg-type]
    assert 0 < timing.host_seconds <= timing.seconds
