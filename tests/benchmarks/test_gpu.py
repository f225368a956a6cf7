"""The accelerator benchmark on the CPU with its small shape; the arithmetic of what it counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import SHAPES, Attempt, Figures, Parts, count_flops


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.set_num_threads(1)
    return Parts(SHAPES["small"], "cpu", torch.float32)


def test_the_large_shape_is_that_of_stable_diffusion() -> None:
    shape = SHAPES["sd15"]
    with torch.device("meta"):
        unet = gpu.UNet2DConditionModel(**shape.unet)
        vae = gpu.AutoencoderKL(latent_channels=4, **shape.vae)
        text = gpu.CLIPTextModel(gpu.CLIPTextConfig(**shape.text))
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (unet, vae, text)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]  # as published


def test_flops_are_those_of_the_operations(parts: Parts) -> None:
    """Of the forward pass once, and of the backward pass no gradients of frozen weights, which would make it thrice."""
    flops = count_flops("small")
    assert flops == count_flops("small", "cpu")
    with gpu.FlopCounterMode(display=False) as counter, gpu.sdpa_kernel(gpu.SDPBackend.MATH), torch.no_grad():
        parts.unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 24, 32))
    forward = counter.get_total_flops()
    assert 1.5 * forward < flops < 2.6 * forward


def test_flops_of_stable_diffusion() -> None:
    assert count_flops("sd15") / 1e12 == pytest.approx(1.70, abs=0.05)  # 1.80 with what fused attention does twice


def test_what_does_not_fit_is_not_tried_again() -> None:
    calls = []

    def work() -> Figures:
        calls.append(1)
        raise torch.OutOfMemoryError("full")

    attempt = Attempt(work)
    assert (attempt(), attempt()) == (None, None)
    assert len(calls) == 1


def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "small", "--device", "cpu", "--slots", "1,2", "--steps", "2", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "eager", "--peak-tflops", "1"]) == 0
    said = capsys.readouterr().out
    for row in ("| common algorithm |", "| 1 slots, eager |", "| 2 slots, eager |"):
        assert row in said


def test_rows_of_what_fits_and_what_does_not() -> None:
    found = {"a": [Figures(100.0, 2.0), Figures(100.0, 3.0)], "b": [None], "c": [Figures(200.0, None)]}
    rows = [[str(value) for value in row] for row in gpu.rows_of(found, lambda rate: 2 * rate, 1.8, 900.0)]
    assert rows == [
        ["a", "100 (100 to 100)", "1.0", "20.0", "3.0", "200.0"],
        ["b", "out of memory", "None", "None", "None", "None"],
        ["c", "200 (200 to 200)", "2.0", "40.0", "None", "400.0"],
    ]


@pytest.mark.slow
def test_a_compiled_model_goes_through_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    """Traced, not built: the compiler itself takes a minute."""
    small = ["--shape", "small", "--device", "cpu", "--slots", "1", "--steps", "1", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "eager,compiled", "--backend", "aot_eager"]) == 0
    assert "| 1 slots, compiled |" in capsys.readouterr().out
