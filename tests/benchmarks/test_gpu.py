"""The accelerator benchmark on the CPU with its small shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.accelerator import Figures
from benchmarks.gpu_rows import NO_KERNEL, TITLES, Attempt, Setting, Work, row_of

ROOT = Path(__file__).resolve().parents[2]

SMALL = ["--shape", "small", "--device", "cpu", "--slots", "1", "--steps", "1", "--repetitions", "1"]

WITHOUT_RAY = """
import importlib.metadata, sys
for name in ("ray", "s3fs", "aiobotocore", "pyarrow"):
    sys.modules[name] = None  # importing it fails
def version(name, known=importlib.metadata.version):
    if name == "ray":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
from benchmarks import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""
"""The command on a machine that has torch, transformers and little else of what the pipeline needs."""


@pytest.mark.slow
def test_neither_ray_nor_a_store_is_needed() -> None:
    """By a process of its own: here they may be imported already."""
    command = [sys.executable, "-c", WITHOUT_RAY, *SMALL, "--modes", "eager"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert ", ray absent, python" in done.stdout
    assert "| 1 slots, eager |" in done.stdout


def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*SMALL, "--slots", "1,2", "--modes", "eager", "--peak-tflops", "1"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("The estimate of memory was not checked: no peak was measured, which takes a GPU.\n")
    assert "samples: 4 a step and concept, 2,000 a concept" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])]
    assert [row[0] for row in cells] == ["", "common algorithm", "1 slots, eager", "2 slots, eager"]
    assert {len(row) for row in cells} == {len(TITLES)}
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    assert rows[0]["GB estimated"] == "-"
    assert 0 < float(rows[1]["GB estimated"]) < float(rows[2]["GB estimated"])
    for row in rows:
        assert float(row["% of the peak"]) > 0
        assert float(row["% of the matrix rate"]) > 0
        assert float(row["concepts/h"].replace(",", "")) <= float(row["concepts/h, known initializer"].replace(",", ""))


def test_each_attention_is_measured_or_said_to_be_absent(capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU has torch's plain attention, and none of cuDNN's; the exit code is 0."""
    assert gpu.main([*SMALL, "--modes", "eager", "--attention", "math,cudnn"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "attention |" in line]
    assert [row[1].strip() for row in rows] == ["1 slots, math attention", "1 slots, cudnn attention"]
    assert float(rows[0][2].split()[0]) > 0
    assert rows[1][2].strip() == NO_KERNEL
    with pytest.raises(SystemExit):
        gpu.main([*SMALL, "--attention", "flashy"])
    assert "--attention: no flashy; there are flash, efficient, cudnn, math" in capsys.readouterr().err


def test_two_text_encoders_are_measured_without_the_common_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*SMALL, "--shape", "small-xl", "--modes", "eager", "--checkpointing"]) == 0
    [row] = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 slots")]
    rate, times = row[2:4]
    assert float(rate.split()[0]) > 0
    assert times.strip() == "-"


def test_each_row_is_there_before_the_next_is_measured_and_compared_with_what_ran_beside_it() -> None:
    order: list[str] = []

    def work(name: str, *rates: float) -> Work:
        results = iter(rates)

        def measure() -> Figures:
            order.append(name)
            return Figures(next(results), None)

        return Work(name, Attempt(measure))

    common = work("common", 0, 100, 100, 0, 50, 50)  # slower by half beside the second; the first of three is warm-up
    rows = []
    setting = Setting(encoding_s=1.0, tflop=1.0, peak=0.0, matrix_rate=1.0)
    for row in gpu.measured(common, iter([work("a", 0, 200, 200), work("b", 0, 200, 200)]), 2):
        order.append(f"row {row[0].name}")
        rows.append(row_of(*row, setting)[:3])
    assert order == [
        *("a", "common", "common", "a", "a", "common", "row common", "row a"),
        *("b", "common", "common", "b", "b", "common", "row b"),
    ]
    assert [(name, times) for name, _, times in rows] == [("common", 1.0), ("a", 2.0), ("b", 4.0)]


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
    assert gpu.main([*SMALL, "--modes", "compiled,eager"]) == 1
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
    assert gpu.main([*SMALL, "--modes", "graphs", "--backend", "aot_eager"]) == 0
    assert "| 1 slots, graphs |" in capsys.readouterr().out
