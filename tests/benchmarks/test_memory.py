"""Estimates of memory for models of real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from benchmarks.random_model import SHAPES, default_dtype
from pipeline.actor.memory_plan import LEARNING_SHARE
from textual_inversion.config import InversionConfig
from textual_inversion.families.base import MemorySaving
from textual_inversion.memory_estimate import learn_made_up, trace


def a_unet(shape: dict[str, Any]) -> tuple[Any, Callable[[], Tensor]]:
    """A U-Net whose weights have no data, and its forward pass of one sample."""
    unet = UNet2DConditionModel(**shape).requires_grad_(False)
    latents = torch.zeros(1, 4, shape["sample_size"], shape["sample_size"])
    text = torch.zeros(1, 77, shape["cross_attention_dim"], requires_grad=True)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    inputs = {"encoder_hidden_states": text, "added_cond_kwargs": added, "return_dict": False}
    return unet, lambda: unet(latents, torch.zeros(1), **inputs)[0]


@pytest.fixture
def half_precision() -> Iterator[None]:
    with default_dtype(torch.bfloat16):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "plain", "saving"),
    [(SHAPES["sd15"].unet, 0.74, 0.15), (SHAPES["sdxl"].unet, 5.14, 0.49)],
    ids=["sd15", "sdxl"],
)
@pytest.mark.usefixtures("half_precision")
def test_what_real_models_keep_of_a_sample(shape: dict[str, Any], plain: float, saving: float) -> None:
    """In GB, as found before with another count of what autograd keeps (fused attention, bfloat16)."""
    mode = FakeTensorMode()
    with mode:
        unet, forward = a_unet(shape)
    assert trace(forward, mode).kept / 1e9 == pytest.approx(plain, abs=0.01)
    unet.enable_gradient_checkpointing()
    assert trace(forward, mode).kept / 1e9 == pytest.approx(saving, abs=0.01)


@pytest.mark.slow
def test_the_command_prints_rows_without_and_with_checkpointing_for_each_path_of_gradients(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert memory.main(["--models", "sd15", "--batch-size", "2", "--pictures", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| sd15")]
    assert ["up path" in line for line in lines] == [False, False, True, True]
    plain, saving, up_path, saving_up_path = ([float(cell) for cell in line.split("|")[2:-1]] for line in lines)
    # 0.86 of U-Net and autoencoder, 0.12 of text, times 2, 4
    assert plain[0] == saving[0] == up_path[0] == saving_up_path[0] == pytest.approx(2.2, abs=0.1)
    assert saving[1] < plain[1] / 3
    assert saving[2] < plain[2]
    assert plain[5] < plain[4]
    assert up_path[1] < 0.8 * plain[1]
    assert up_path[2] < plain[2]
    assert saving_up_path[1] < saving[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("ldm", 0.872, 0.54),
        ("sd35-medium", 2.243 + 4.762, 0.123 + 0.695),
        ("sd35-large", 8.057 + 4.762, 0.123 + 0.695),
        ("flux", 11.901 + 4.762, 0.123),
    ],
)
def test_a_model_has_the_size_of_the_published_one(name: str, half: float, full: float) -> None:
    """Billions of weights in bfloat16 (denoiser, T5) and in float32 (other text encoders); tables of positions, which
    are no weights, are the rest."""
    mode = FakeTensorMode()
    with mode:
        backbone = memory.a_model(name)
    found = trace(lambda: learn_made_up(backbone, InversionConfig(batch_size=1), 1), mode)
    assert found.weights / 1e9 == pytest.approx(2 * half + 4 * full, rel=0.06)
    assert 0 < found.kept < found.peak


@pytest.mark.slow
def test_stable_diffusion_xl_learns_on_a_card_of_24_gb_with_checkpointing_only() -> None:
    """A pass of 4 samples, within the share of the free memory that an actor gives to learning."""
    mode = FakeTensorMode()
    with mode:
        backbone = memory.a_model("sdxl")
    fits = {}
    for checkpoints in (False, True):
        backbone.save_memory(MemorySaving(checkpoints_gradients=checkpoints))
        found = trace(lambda: learn_made_up(backbone, InversionConfig(batch_size=4), 1), mode)
        fits[checkpoints] = found.peak < LEARNING_SHARE * (24e9 - found.weights)
    assert fits == {False: False, True: True}
