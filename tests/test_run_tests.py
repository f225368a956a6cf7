"""`make test` runs every group of tests and reports the failures of all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run_tests.py"
SETTINGS = "[pytest]\nmarkers =\n    slow\n    own_cluster\n"
TESTS = """
import pytest

def test_fast(): assert {fast}

@pytest.mark.slow
def test_slow(): assert {slow}

@pytest.mark.slow
@pytest.mark.own_cluster
def test_cluster(): assert {cluster}
"""


def run_groups(folder: Path, *, fast: bool = True, slow: bool = True, cluster: bool = True) -> tuple[int, list[str]]:
    (folder / "tests").mkdir()
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "tests" / "test_groups.py").write_text(TESTS.format(fast=fast, slow=slow, cluster=cluster))
    run = subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout.strip().splitlines()


def test_all_failures_are_reported_at_the_end(tmp_path: Path) -> None:
    code, lines = run_groups(tmp_path, fast=False, slow=True, cluster=False)
    assert code == 1
    fast, fast_test, slow, cluster, cluster_test = lines[-5:]
    assert fast.startswith("FAILED (exit code 1)")
    assert fast.endswith(": not slow")
    assert fast_test.split() == ["tests.test_groups::test_fast"]
    assert slow.startswith("passed")
    assert cluster.startswith("FAILED (exit code 1)")
    assert cluster_test.split() == ["tests.test_groups::test_cluster"]


def test_no_failure_is_exit_code_0(tmp_path: Path) -> None:
    code, lines = run_groups(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in lines[-3:]] == ["passed"] * 3
