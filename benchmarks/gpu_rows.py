"""Rows of the table of `benchmarks.gpu`: what was measured of a work, and what is calculated from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Generic, TypeVar

import torch

from benchmarks.accelerator import Figures
from benchmarks.timing import Spread, number
from pipeline.actor.memory_plan import LEARNING_SHARE
from textual_inversion.config import InversionConfig

T = TypeVar("T")

BUDGET_SAMPLES = InversionConfig().steps * InversionConfig().batch_size
"""Samples that a concept is learned from by default."""

TITLES = [
    "",
    "sample-steps/s",
    "times the common algorithm beside it",
    "% of the peak",
    "% of the matrix rate",
    "GB above weights",
    "GB estimated",
    "measured / estimated",
    "s a sample grid",
    "s an initializer's pictures",
    "concepts/h",
    "concepts/h, known initializer",
]

OUT_OF_MEMORY = "out of memory"

NO_KERNEL = "no kernel for it on this device"

_NO_ATTENTION = ("No available kernel", "No viable backend for scaled_dot_product_attention")
"""Starts of torch's messages where a device lacks the asked attention; the errors have no class of their own."""


class Attempt(Generic[T]):
    """Work that may fail, mostly for lack of memory; a call then returns None, and later calls do not try again."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.error = ""
        self.results: list[T] = []

    def __call__(self) -> T | None:
        if self.error:
            return None
        try:
            self.results.append(self._work())
            return self.results[-1]
        except torch.OutOfMemoryError:
            self.error = OUT_OF_MEMORY
        except RuntimeError as error:  # one mode that cannot be compiled must not take the others' rows with it
            text = str(error).strip().partition("\n")[0]
            self.error = NO_KERNEL if text.startswith(_NO_ATTENTION) else f"{type(error).__name__}: {text}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # after the except clause: the error's stack holds tensors
        return None


@dataclass(frozen=True, slots=True)
class Drawing:
    """Seconds to draw a concept's sample pictures, in one mode."""

    own: float
    """Seconds of the concept's own grid."""
    initializer: float
    """Seconds of its initializer word's pictures, which scores compare with."""


@dataclass(slots=True)
class Work:
    """Row of the table to be measured."""

    name: str
    attempt: Attempt[Figures]
    drawing: Drawing | None = None
    """Drawing in the same mode; None if it failed."""
    estimated_gb: float | None = None
    """Estimate of `memory_gb` without compilation; None for the common algorithm."""
    is_eager: bool = False
    """Whether the estimate is of the same code: nothing of the row is compiled."""
    rates: list[float] = field(default_factory=list)
    """Sample-steps a second of each repetition; empty if one failed."""

    def with_figures(self, found: Sequence[Figures | None]) -> Work:
        rates = [figures.rate for figures in found if figures]
        return replace(self, rates=[] if self.attempt.error else rates)

    @property
    def memory_gb(self) -> float | None:
        """Peak memory of all repetitions and of the warm-up, in which graphs are recorded; None on a CPU."""
        return max((each.memory_gb for each in self.attempt.results if each.memory_gb), default=None)

    @property
    def memory_ratio(self) -> float | None:
        """Measured memory over estimated memory; None where either is unknown."""
        return self.memory_gb / self.estimated_gb if self.memory_gb and self.estimated_gb else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the rows of a table have in common."""

    encoding_s: float
    """Seconds to encode a concept's photos."""
    tflop: float
    """Model FLOPs of a sample-step, in TFLOP."""
    peak: float
    """Peak of the device by its data sheet, in TFLOP/s; 0 if unknown."""
    matrix_rate: float
    """Measured rate of matrix products, in TFLOP/s."""


def row_of(work: Work, beside: Work | None, setting: Setting) -> list[object]:
    """Return a row of the table; `beside`: the common algorithm in the same repetitions."""
    if not work.rates:
        return [work.name, work.attempt.error, *[None] * (len(TITLES) - 2)]
    rate = Spread.of(work.rates)
    times = rate.median / median(beside.rates) if beside and beside.rates else None
    used = [100 * rate.median * setting.tflop / of if of else None for of in (setting.peak, setting.matrix_rate)]
    memory = [work.memory_gb, work.estimated_gb, work.memory_ratio]
    drawing = work.drawing
    if drawing is None:
        return [work.name, rate, times, *used, *memory, *[None] * 4]
    known = setting.encoding_s + BUDGET_SAMPLES / rate.median + drawing.own
    hourly = [3600 / (known + drawing.initializer), 3600 / known]
    return [work.name, rate, times, *used, *memory, drawing.own, drawing.initializer, *hourly]


def memory_verdict(ratios: Sequence[float]) -> str:
    """Return a sentence on the estimate of memory. `ratios`: measured over estimated memory of each eager row."""
    if not ratios:
        return "The estimate of memory was not checked: no peak was measured, which takes a GPU."
    holds = max(ratios) <= 1 / LEARNING_SHARE
    return (
        f"Measured memory is {number(min(ratios))} to {number(max(ratios))} times the estimate in {len(ratios)} eager "
        f"rows, which is {'within' if holds else 'MORE THAN'} the {number(1 / LEARNING_SHARE)} times that an actor "
        "leaves free for it."
    )
