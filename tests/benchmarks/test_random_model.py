"""Random models of real shapes, and the arithmetic of what they compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks import random_model
from benchmarks.random_model import SHAPES, Parts, count_flops


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.set_num_threads(1)
    return Parts(SHAPES["small"], "cpu", torch.float32)


def test_the_large_shape_is_that_of_stable_diffusion() -> None:
    shape = SHAPES["sd15"]
    with torch.device("meta"):
        unet = random_model.UNet2DConditionModel(**shape.unet)
        vae = random_model.AutoencoderKL(latent_channels=4, **shape.vae)
        text = random_model.CLIPTextModel(random_model.CLIPTextConfig(**shape.text))
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (unet, vae, text)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]  # as published


def test_the_largest_shape_is_that_of_stable_diffusion_xl() -> None:
    shape = SHAPES["sdxl"]
    assert shape.text_2
    with torch.device("meta"):
        unet = random_model.UNet2DConditionModel(**shape.unet)
        text = random_model.text_encoder(random_model.CLIPTextModelWithProjection, shape.text_2)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (unet, text)]
    assert sizes == [2_567_463_684, 694_659_840]  # as published


def test_flops_are_those_of_the_operations(parts: Parts) -> None:
    """Of the forward pass once, and of the backward pass no gradients of frozen weights, which would make it thrice."""
    flops = count_flops("small")
    assert flops == count_flops("small", "cpu")
    with (
        random_model.FlopCounterMode(display=False) as counter,
        random_model.sdpa_kernel(random_model.SDPBackend.MATH),
        torch.no_grad(),
    ):
        parts.unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 24, 32))
    forward = counter.get_total_flops()
    assert 1.5 * forward < flops < 2.6 * forward


def test_flops_of_stable_diffusion() -> None:
    assert count_flops("sd15") / 1e12 == pytest.approx(1.70, abs=0.05)  # 1.80 with what fused attention does twice
