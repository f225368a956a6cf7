"""Packing the accelerator benchmark for a bare machine, and running its parts there, each within its bound."""

from __future__ import annotations

import ast
import fcntl
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_job
from benchmarks.gpu_job import PACKAGES, bounded, pinned

ROOT = Path(__file__).resolve().parents[2]


def no_wheels(_packages: object, folder: str, _python: str) -> None:
    (Path(folder) / "a-1-py3-none-any.whl").write_bytes(b"a wheel")


def test_an_archive_has_the_code_the_wheels_and_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_job, "download", no_wheels)
    archive = tmp_path / "job.tar.gz"
    assert gpu_job.main(["pack", str(archive)]) == 0
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar.getmembers()}
    needed = ("benchmarks/gpu_job.py", "benchmarks/gpu.py", "textual_inversion/engine.py", "pipeline/config.py",
              "demo/model/tokenizer/tokenizer.json", "wheels/a-1-py3-none-any.whl")  # fmt: skip
    assert {f"gpu_job/{name}" for name in needed} <= names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_packages_to_carry_have_the_versions_that_this_project_is_tested_with() -> None:
    found = pinned((ROOT / "constraints.txt").read_text())
    assert [each.partition("==")[0] for each in found] == [*PACKAGES]
    with pytest.raises(ValueError, match=r"no version of pydantic_core, annotated-types"):
        pinned("diffusers==1\npydantic==2\n")


def test_a_call_that_takes_too_long_is_ended_with_its_children_and_leaves_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock = tmp_path / "out", tmp_path / "lock"
    wait = subprocess.Popen.wait

    def wait_for_the_child(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """Time is up as soon as the child has said that it runs."""
        if timeout is None:
            return wait(process)
        while not out.read_text():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired([], timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_child)
    child = (
        "import fcntl, sys, time; held = open(sys.argv[1], 'w'); fcntl.flock(held, fcntl.LOCK_EX); "
        "print('a row', flush=True); time.sleep(600)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    assert bounded([sys.executable, "-c", parent, child, str(lock)], out, tmp_path / "err", 1) is None
    assert out.read_text() == "a row\n"
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the child's end, or for the test's bound


def test_a_call_tells_its_exit_code(tmp_path: Path) -> None:
    fails = [sys.executable, "-c", "import sys; sys.stderr.write('no GPU'); sys.exit(3)"]
    assert bounded(fails, tmp_path / "out", tmp_path / "err", 60) == 3
    assert (tmp_path / "err").read_text() == "no GPU"


def test_a_part_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_job.main(["run", str(tmp_path), "--parts", "eager,fast"])
    assert "--parts: no part fast; there are eager, compiled" in capsys.readouterr().err


def test_nothing_but_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "benchmarks/gpu_job.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, None), 1), ((1, 0), 1)])
def test_both_parts_are_measured_within_their_own_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    codes: tuple[int | None, ...], expected: int,
) -> None:  # fmt: skip
    calls: list[tuple[list[str], str, float]] = []
    left = iter(codes)

    def measured(command: list[str], out: Path, err: Path, seconds: float, environment: dict[str, str]) -> int | None:
        out.write_text(f"| {out.stem} |\n")
        assert err.parent == out.parent == tmp_path / "tables"
        assert str(ROOT) in environment["PYTHONPATH"]
        calls.append((command[1:], out.name, seconds))
        return next(left)

    monkeypatch.setattr(gpu_job, "bounded", measured)
    assert gpu_job.main(["run", str(tmp_path / "tables"), "--compiled-minutes", "5", "--shape", "sdxl"]) == expected
    benchmark = ["-m", "benchmarks.gpu", "--short", "--modes"]
    assert calls == [
        ([*benchmark, "eager", "--shape", "sdxl"], "eager.md", 240),
        ([*benchmark, "compiled,graphs", "--slots", "8", "--shape", "sdxl"], "compiled.md", 300),
    ]
    said = capsys.readouterr().out
    assert "| eager |" in said
    assert ("compiled: ended after 5 minutes" in said) == (codes[1] is None)
