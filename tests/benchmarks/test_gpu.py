"""The accelerator benchmark on the CPU with its small shape; the arithmetic of what it counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Attempt, Figures, Work


def test_what_does_not_fit_is_not_tried_again() -> None:
    calls = []

    def work() -> Figures:
        calls.append(1)
        raise torch.OutOfMemoryError("full")

    attempt = Attempt(work)
    assert (attempt(), attempt()) == (None, None)
    assert len(calls) == 1
    assert attempt.error == "out of memory"


def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "small", "--device", "cpu", "--slots", "1,2", "--steps", "2", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "eager", "--peak-tflops", "1"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("The estimate of memory was not checked: no peak was measured, which takes a GPU.\n")
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "common algorithm",
        "1 slots, eager",
        "2 slots, eager",
    ]
    assert {line.count("|") for line in table} == {len(gpu.TITLES) + 1}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])]
    estimates = [row[cells[0].index("GB estimated")] for row in cells]
    assert estimates[1] == "-"
    assert 0 < float(estimates[2]) < float(estimates[3])


def test_two_text_encoders_are_measured_without_the_common_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "small-xl", "--device", "cpu", "--slots", "1", "--steps", "1", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "eager", "--checkpointing"]) == 0
    [row] = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 slots")]
    rate, times = row[2:4]
    assert float(rate.split()[0]) > 0
    assert times.strip() == "-"


def test_measured_memory_must_stay_within_what_an_actor_leaves_free() -> None:
    verdict = gpu.memory_verdict([1.2, 0.5])
    assert "is 0.5 to 1.20 times the estimate in 2 eager rows, which is within the 1.43 times" in verdict
    assert "which is MORE THAN the 1.43 times" in gpu.memory_verdict([0.5, 1.5])


def test_each_row_is_there_before_the_next_is_measured_and_compared_with_what_ran_beside_it() -> None:
    order: list[str] = []

    def work(name: str, *rates: float) -> Work:
        results = iter(rates)

        def measure() -> Figures:
            order.append(name)
            return Figures(next(results), None)

        return Work(name, Attempt(measure), 1.0)

    common = work("common", 0, 100, 100, 0, 50, 50)  # slower by half beside the second; the first of three is warm-up
    rows = []
    for row in gpu.measured(common, iter([work("a", 0, 200, 200), work("b", 0, 200, 200)]), 2):
        order.append(f"row {row[0].name}")
        rows.append(gpu.row_of(*row, once=1.0, tflop=1.0, peak=0.0)[:3])
    assert order == [
        *("a", "common", "common", "a", "a", "common", "row common", "row a"),
        *("b", "common", "common", "b", "b", "common", "row b"),
    ]
    assert [(name, times) for name, _, times in rows] == [("common", 1.0), ("a", 2.0), ("b", 4.0)]


def test_a_row_of_what_fits_and_of_what_does_not() -> None:
    def full() -> Figures:
        raise torch.OutOfMemoryError("full")

    beside = Work("common", Attempt(full), rates=[100.0, 100.0])
    work = Work("a", Attempt(full), grid=9.0, estimated_gb=2.5, rates=[150.0, 250.0])
    work.attempt.results = [Figures(1.0, 3.0), Figures(150.0, 2.0), Figures(250.0, 2.0)]  # warm-up took most memory
    row = gpu.row_of(work, beside, once=1.25, tflop=1.8, peak=900.0)
    memory = ["3.0", "2.5", "1.2"]
    assert [str(value) for value in row] == ["a", "200 (150 to 250)", "2.0", "40.0", *memory, "9.0", "240.0"]
    work.attempt()
    assert gpu.row_of(work.with_figures([None]), beside, 1.0, 1.8, 900.0) == ["a", "out of memory", *[None] * 7]


def test_a_mode_that_fails_leaves_the_others_their_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that is not there, say."""

    def fails(*_arguments: object) -> None:
        raise RuntimeError("no such compiler\nand much more")

    plain = gpu.Parts.backbone

    def backbone(parts: gpu.Parts, mode: str = "eager", _compiler: str = "") -> object:
        made = plain(parts)
        if mode == "compiled":
            made.predict = fails  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(gpu.Parts, "backbone", backbone)
    small = ["--shape", "small", "--device", "cpu", "--slots", "1", "--steps", "1", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "compiled,eager"]) == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "common algorithm",
        "1 slots, eager",
        "1 slots, compiled",
    ]
    assert "RuntimeError: no such compiler | - |" in table[-1]


@pytest.mark.parametrize(
    ("arguments", "slots", "compiled"),
    [
        ([], [1, 2, 4, 8, 16, 32], [1, 8]),
        (["--slots", "2,3"], [2, 3], [2, 3]),
        (["--short"], [1, 4, 8, 16], [8]),
        (["--short", "--slots", "2", "--compiled-slots", "4,5"], [2], [4, 5]),
    ],
)
def test_what_is_compiled_takes_minutes_and_is_asked_for_by_itself(
    arguments: list[str], slots: list[int], compiled: list[int]
) -> None:
    options = gpu.parse(arguments)
    assert (options.slots, options.compiled_slots) == (slots, compiled)
    assert (options.steps, options.repetitions) == ((10, 3) if "--short" in arguments else (20, 5))


@pytest.mark.slow
def test_a_compiled_model_goes_through_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    """Traced, not built: the compiler itself takes a minute."""
    small = ["--shape", "small", "--device", "cpu", "--slots", "1", "--steps", "1", "--repetitions", "1"]
    assert gpu.main([*small, "--modes", "eager,graphs", "--backend", "aot_eager"]) == 0
    said = capsys.readouterr().out
    for row in ("| 1 slots, eager |", "| 1 slots, graphs |"):
        assert row in said
