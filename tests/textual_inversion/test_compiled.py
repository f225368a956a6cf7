"""A model through torch.compile, and without it where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from textual_inversion.compiled import Compiled, compile_checked
from textual_inversion.config import SamplingConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate


def no_compiler(_module: Any, _inputs: list[Tensor]) -> Callable[..., Any]:
    raise RuntimeError("no C compiler was found")


def test_what_cannot_be_compiled_is_called_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = nn.Linear(3, 2), torch.ones(4, 3)
    compiled = Compiled(module, backend=no_compiler, or_plain=True)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "textual_inversion"):
        for _ in range(2):
            assert torch.equal(compiled(inputs), module(inputs))
    (line,) = caplog.messages
    assert "no C compiler was found" in line


def test_or_it_is_an_error() -> None:
    compiled = Compiled(nn.Linear(3, 2), backend=no_compiler)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no C compiler was found"):
        compiled(torch.ones(4, 3))


def test_what_the_module_raises_is_its_own() -> None:
    compiled = Compiled(nn.Linear(3, 2), backend="eager", or_plain=True)
    with pytest.raises(RuntimeError, match="shapes"):
        compiled(torch.ones(4, 5))


def twice(module: Any, _inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler that errs."""
    return lambda *args: [2 * output for output in module(*args)]


@pytest.fixture
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(str(tiny_model), device="cpu", precision="float32")


@pytest.mark.parametrize("gradients", [False, True])
def test_a_compiler_that_errs_is_not_used(
    backbone: Backbone, caplog: pytest.LogCaptureFixture, gradients: bool
) -> None:
    request, sampling = [ImageRequest("a cat", 1)], SamplingConfig(steps=1, batch_size=1)
    (before,) = generate(backbone, request, sampling)
    with caplog.at_level(logging.WARNING, "textual_inversion"):
        assert not compile_checked(backbone, 2, gradients=gradients, backend=twice, or_plain=True)  # type: ignore[arg-type]
    assert "changes what the denoiser computes by" in caplog.text
    (after,) = generate(backbone, request, sampling)
    assert after.tobytes() == before.tobytes()
    with pytest.raises(RuntimeError, match="changes what the denoiser computes"):
        compile_checked(backbone, 2, gradients=gradients, backend=twice)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_model_learns_and_draws_the_same(backbone: Backbone, tiny_backbone: Backbone) -> None:
    """By torch's own compiler, with gradients through the frozen network."""
    assert compile_checked(backbone, 2, gradients=True)
    sampling = SamplingConfig(steps=2, batch_size=1)
    (ours,), (plain,) = (generate(each, [ImageRequest("a cat", 1)], sampling) for each in (backbone, tiny_backbone))
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), plain.tobytes(), strict=True)) <= 2
