"""What an accelerator can do: timing of work that it does by itself, and its rate of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Peak of dense bfloat16 on SXM boards by their data sheets, by a part of the device's name."""

_SIDES = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices of `matrix_tflops`: large enough that a product keeps the whole device busy."""

_PRODUCTS = {"cuda": 20, "cpu": 5}
"""Products that are timed together."""

_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of one repetition."""

    rate: float
    """Samples a second."""
    memory_gb: float | None
    """Peak memory above the memory in use before; None on a CPU."""


def timed(work: Callable[[], object], samples: int, device: str) -> Figures:
    """Time a work from an idle device to an idle device."""
    if device == "cpu":
        began = time.perf_counter()
        work()
        return Figures(samples / (time.perf_counter() - began), None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return Figures(samples / seconds, (torch.cuda.max_memory_allocated() - before) / 1e9)


def matrix_tflops(device: str, dtype: torch.dtype) -> float:
    """Return the rate of products of large square matrices of random numbers, in TFLOP/s: the median of three trials.

    Programs reach no more than this; a data sheet's peak is of clocks that a chip does not keep under such a load, and
    zeros in place of random numbers would be faster, too.
    """
    side, products = _SIDES[device], _PRODUCTS[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(products):
            left @ right

    for _ in range(_WARM_UPS):
        left @ right
    rate = median(timed(multiply, products, device).rate for _ in range(3))
    return rate * 2 * side**3 / 1e12


def peak_tflops(device_name: str) -> float:
    """Return a device's peak by its data sheet, in TFLOP/s; 0 for one that is not in the table."""
    return next((value for name, value in PEAK_TFLOPS.items() if name in device_name), 0.0)
