"""Rows of the accelerator benchmark: what was measured, and what is calculated from it."""

from __future__ import annotations

import torch

from benchmarks.accelerator import Figures
from benchmarks.gpu_rows import BUDGET_SAMPLES, TITLES, Attempt, Drawing, Setting, Work, memory_verdict, row_of
from textual_inversion.config import InversionConfig

SETTING = Setting(encoding_s=1.0, tflop=1.8, peak=900.0, matrix_rate=720.0)


def full() -> Figures:
    raise torch.OutOfMemoryError("full")


def test_what_does_not_fit_is_not_tried_again() -> None:
    calls = []

    def work() -> Figures:
        calls.append(1)
        return full()

    attempt = Attempt(work)
    assert (attempt(), attempt()) == (None, None)
    assert len(calls) == 1
    assert attempt.error == "out of memory"


def test_the_budget_is_that_of_the_default_recipe() -> None:
    default = InversionConfig()
    assert default.steps * default.batch_size == BUDGET_SAMPLES


def test_measured_memory_must_stay_within_what_an_actor_leaves_free() -> None:
    verdict = memory_verdict([1.2, 0.5])
    assert "is 0.5 to 1.20 times the estimate in 2 eager rows, which is within the 1.43 times" in verdict
    assert "which is MORE THAN the 1.43 times" in memory_verdict([0.5, 1.5])


def test_a_row_of_what_fits_and_of_what_does_not() -> None:
    beside = Work("common", Attempt(full), rates=[100.0, 100.0])
    work = Work("a", Attempt(full), Drawing(own=4.0, initializer=5.0), estimated_gb=2.5, rates=[150.0, 250.0])
    work.attempt.results = [Figures(1.0, 3.0), Figures(150.0, 2.0), Figures(250.0, 2.0)]  # warm-up took most memory
    row = dict(zip(TITLES, row_of(work, beside, SETTING), strict=True))
    learning_s = BUDGET_SAMPLES / 200
    assert {title: str(value) for title, value in row.items()} == {
        "": "a",
        "sample-steps/s": "200 (150 to 250)",
        "times the common algorithm beside it": "2.0",
        "% of the peak": "40.0",
        "% of the matrix rate": "50.0",
        "GB above weights": "3.0",
        "GB estimated": "2.5",
        "measured / estimated": "1.2",
        "s a sample grid": "4.0",
        "s an initializer's pictures": "5.0",
        "concepts/h": str(3600 / (1 + learning_s + 4 + 5)),
        "concepts/h, known initializer": str(3600 / (1 + learning_s + 4)),
    }
    work.attempt()
    assert row_of(work.with_figures([None]), beside, SETTING) == ["a", "out of memory", *[None] * (len(TITLES) - 2)]


def test_a_row_without_pictures_or_a_known_peak_leaves_out_what_needs_them() -> None:
    work = Work("a", Attempt(full), rates=[200.0])
    unknown = Setting(encoding_s=1.0, tflop=1.8, peak=0.0, matrix_rate=720.0)
    row = dict(zip(TITLES, row_of(work, None, unknown), strict=True))
    known = {title for title, value in row.items() if value is not None}
    assert known == {"", "sample-steps/s", "% of the matrix rate"}
