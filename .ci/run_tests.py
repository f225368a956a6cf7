"""Run every group of tests in a pytest process of its own, two at a time, and repeat at the end what failed.

The longest group begins first, and whichever process ends first takes the next group. A group needs about one core:
tests of whole runs on Ray often wait. Each has a Ray folder of its own, so that no run finds the cluster of a test in
another group. The first group's output goes to the terminal, that of the others is written as they end. A failure in
one group does not keep the others from running. Exits with 1 if a group failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROCESSES = 2
WHOLE_RUNS, PIPELINE = ("tests/e2e", "tests/faults"), "tests/pipeline"
SLOWEST = ("--durations=15", "--durations-min=5")
"""Arguments with which pytest ends by telling the slowest tests."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tests that one pytest process runs."""

    title: str
    selection: tuple[str, ...]
    """Arguments of pytest."""


GROUPS = (
    Group("slow, whole runs", (*WHOLE_RUNS, "-m", "slow and not own_cluster")),
    Group("fast", ("tests", "-m", "not slow")),
    Group("slow, pipeline", (PIPELINE, "-m", "slow")),
    Group("slow, the rest", ("tests", *(f"--ignore={folder}" for folder in (*WHOLE_RUNS, PIPELINE)), "-m", "slow")),
    Group("own cluster", (*WHOLE_RUNS, "-m", "own_cluster")),
)
"""In the order in which they begin."""


def run_group(number: int, folder: Path) -> tuple[int, str]:
    """Run a group with its files in `folder`, and return pytest's exit code and the lines that summarise it."""
    began = time.monotonic()
    group, log, report = GROUPS[number], folder / "log", folder / "junit.xml"
    folder.mkdir()
    command = [sys.executable, "-m", "pytest", *group.selection, *SLOWEST, f"--junit-xml={report}"]
    environment = os.environ | {"RAY_TMPDIR": str(folder)}
    if number == 0:
        code = subprocess.run(command, env=environment).returncode
    else:
        with log.open("wb") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        sys.stdout.write("\n" + log.read_text(errors="replace"))
        sys.stdout.flush()
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    heading = f"{'passed' if code == 0 else f'FAILED (exit code {code})'} in {minutes}:{seconds:02d}: {group.title}"
    return code, "\n".join([heading, *failures(report)])


def failures(report: Path) -> list[str]:
    """Return a line for each failed test of a JUnit report; none if pytest wrote no report."""
    if not report.exists():
        return []
    cases = ElementTree.parse(report).iter("testcase")
    failed = (case for case in cases if case.find("failure") is not None or case.find("error") is not None)
    return [f"    {case.get('classname')}::{case.get('name')}" for case in failed]


def main() -> int:
    # Ray's sockets lie in its folder, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ti", dir="/tmp") as name, ThreadPoolExecutor(PROCESSES) as threads:
        folders = [Path(name) / str(number) for number in range(len(GROUPS))]
        results = list(threads.map(run_group, range(len(GROUPS)), folders))
    sys.stdout.write("\n" + "\n".join(summary for _, summary in results) + "\n")
    return 1 if any(code for code, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
