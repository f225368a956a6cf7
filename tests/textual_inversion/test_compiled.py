"""A module through torch.compile, and without it where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from textual_inversion.compiled import Compiled, graphs_work_in_threads


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


def test_more_shapes_are_compiled_than_torch_would_on_its_own() -> None:
    shapes: list[int] = []

    def counted(module: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        shapes.append(len(inputs[-1]))
        return module  # type: ignore[no-any-return]

    compiled = Compiled(nn.Linear(3, 2), backend=counted)  # type: ignore[arg-type]
    for size in range(2, 22):
        compiled(torch.ones(size, 3))
    assert len(shapes) == 20


@pytest.mark.parametrize(
    ("version", "expected"), [("2.6.0", False), ("2.12.1+cu130", False), ("2.13.0+cu130", True), ("3.0.0", True)]
)
def test_graphs_work_in_threads_from_torch_2_13_on(
    monkeypatch: pytest.MonkeyPatch, version: str, expected: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert graphs_work_in_threads() is expected
