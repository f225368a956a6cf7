"""`make test` runs every group of tests and reports the failures of all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run_tests.py"
SETTINGS = "[pytest]\nmarkers =\n    slow\n    own_cluster\n"
SLOW = "import pytest\n@pytest.mark.slow\n"
FILES = {
    "test_fast.py": "def test_fast(): assert {fast}",
    "test_slow.py": SLOW + "def test_slow(): assert {slow}",
    "pipeline/test_stage.py": SLOW + "def test_stage(): assert {stage}",
    "e2e/test_run.py": SLOW + "def test_run(): assert {run}",
    "faults/test_nodes.py": SLOW + "@pytest.mark.own_cluster\ndef test_nodes(): assert {nodes}",
}


def run_groups(
    folder: Path, *, fast: bool = True, slow: bool = True, stage: bool = True, run: bool = True, nodes: bool = True
) -> tuple[int, list[str]]:
    (folder / "pytest.ini").write_text(SETTINGS)
    for name, text in FILES.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(fast=fast, slow=slow, stage=stage, run=run, nodes=nodes))
    process = subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, capture_output=True, text=True)
    return process.returncode, process.stdout.strip().splitlines()


def test_all_failures_are_reported_at_the_end(tmp_path: Path) -> None:
    code, lines = run_groups(tmp_path, fast=False, nodes=False)
    assert code == 1
    run, fast, fast_test, stage, slow, nodes, nodes_test = lines[-7:]
    assert run.startswith("passed")
    assert run.endswith(": slow, whole runs")
    assert fast.startswith("FAILED (exit code 1)")
    assert fast.endswith(": fast")
    assert fast_test.split() == ["tests.test_fast::test_fast"]
    assert stage.startswith("passed")
    assert stage.endswith(": slow, pipeline")
    assert slow.startswith("passed")
    assert slow.endswith(": slow, the rest")
    assert nodes.startswith("FAILED (exit code 1)")
    assert nodes.endswith(": own cluster")
    assert nodes_test.split() == ["tests.faults.test_nodes::test_nodes"]


def test_every_test_runs_once_and_no_failure_is_exit_code_0(tmp_path: Path) -> None:
    code, lines = run_groups(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in lines[-5:]] == ["passed"] * 5
    assert sum("1 passed" in line for line in lines) == len(FILES)
