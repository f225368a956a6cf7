"""Layout of convolutions: channels-last only where the operations between them keep it, or are compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from textual_inversion import memory_layout
from textual_inversion.compile_trial import Pass, pass_results
from textual_inversion.families import load_backbone
from textual_inversion.families import unet as unet_module
from textual_inversion.memory_layout import convolution_layout, keeps_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAST, USUAL = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("device", "is_kept", "is_compiled", "expected"),
    [(GPU, True, False, LAST), (GPU, False, False, USUAL), (GPU, False, True, LAST), (GPU, True, True, LAST),
     (CPU, True, False, USUAL), (CPU, True, True, USUAL)],
)  # fmt: skip
def test_convolutions_have_the_layout_that_their_neighbours_keep(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, is_kept: bool, is_compiled: bool, expected: object
) -> None:
    monkeypatch.setattr(memory_layout, "keeps_channels_last", lambda *_: is_kept)
    assert convolution_layout(device, torch.bfloat16, is_compiled=is_compiled) == expected


def test_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(given: torch.Tensor, _groups: int) -> torch.Tensor:
        assert given.is_contiguous(memory_format=LAST)
        return given.contiguous()

    monkeypatch.setattr(memory_layout.F, "group_norm", norm)
    assert not keeps_channels_last(CPU, torch.float32)
    monkeypatch.setattr(memory_layout.F, "group_norm", lambda given, _groups: given * 2)
    assert keeps_channels_last(CPU, torch.float32)


def test_a_unet_changes_its_layout_with_the_way_it_is_run_and_nothing_else(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet_module, "convolution_layout", lambda *_, is_compiled: LAST if is_compiled else USUAL)
    backbone = load_backbone(str(tiny_model), device="cpu", precision="float32")
    convolution: nn.Conv2d = backbone._network.conv_in  # type: ignore[attr-defined]
    one = Pass(2, gradients=True)
    plain = pass_results(backbone, one)
    assert convolution.weight.is_contiguous()
    backbone.compile(backend="eager")
    assert convolution.weight.is_contiguous(memory_format=LAST)
    assert not convolution.weight.is_contiguous()
    for ours, theirs in zip(pass_results(backbone, one), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    backbone.uncompile()
    assert convolution.weight.is_contiguous()
