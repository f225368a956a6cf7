"""Timing on an idle device, and the rate of matrix products."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import accelerator
from benchmarks.accelerator import Figures, matrix_tflops, peak_tflops, timed


def test_a_rate_is_of_the_work_alone_and_a_cpu_counts_no_memory() -> None:
    figures = timed(lambda: time.sleep(0.05), 10, "cpu")
    assert 0 < figures.rate <= 200
    assert figures.memory_gb is None


def test_a_matrix_product_counts_a_multiplication_and_an_addition_for_each_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half_a_second_each(work: object, samples: int, _device: str) -> Figures:
        assert callable(work)
        work()
        return Figures(rate=samples / (0.5 * samples), memory_gb=None)

    monkeypatch.setattr(accelerator, "timed", half_a_second_each)
    assert matrix_tflops("cpu", torch.float32) == pytest.approx(2 * 2 * 1024**3 / 1e12)


def test_the_peak_of_a_board_and_of_an_unknown_one() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("CPU, 1 threads") == 0
