"""Run every group of tests in a pytest process of its own, two at a time, and repeat at the end what failed.

There are two lanes of groups; the groups of a lane run one after the other. A lane needs about one core: tests of whole
runs on Ray often wait. Each lane has a Ray folder of its own, so that no run finds the cluster of a test in the other
lane. The second lane's output is written group by group as they end. A failure in one group does not keep the others
from running. Exits with 1 if a group failed.
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

WHOLE_RUNS = ("tests/e2e", "tests/faults")


@dataclass(frozen=True, slots=True)
class Group:
    """Tests that one pytest process runs."""

    title: str
    selection: tuple[str, ...]
    """Arguments of pytest."""


LANES = (
    (
        Group("slow, whole runs", (*WHOLE_RUNS, "-m", "slow and not own_cluster")),
        Group("own cluster", ("tests", "-m", "own_cluster")),
    ),
    (
        Group("fast", ("tests", "-m", "not slow")),
        Group(
            "slow, the rest",
            ("tests", *(f"--ignore={folder}" for folder in WHOLE_RUNS), "-m", "slow and not own_cluster"),
        ),
    ),
)


def run_group(group: Group, report: Path, environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """Run one group and return pytest's exit code and the lines that summarise it.

    pytest's output goes to the terminal; with `log`, it is kept in that file and written when the group has ended.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", *group.selection, f"--junit-xml={report}"]
    if log is None:
        code = subprocess.run(command, env=environment).returncode
    else:
        with log.open("wb") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        sys.stdout.write("\n" + log.read_text(errors="replace"))
        sys.stdout.flush()
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    heading = f"{'passed' if code == 0 else f'FAILED (exit code {code})'} in {minutes}:{seconds:02d}: {group.title}"
    return code, "\n".join([heading, *failures(report)])


def run_lane(number: int, folder: Path) -> list[tuple[int, str]]:
    """Run the groups of one lane, one after the other, and return each one's exit code and summary."""
    environment = {**os.environ, "RAY_TMPDIR": str(folder)}
    results = []
    for place, group in enumerate(LANES[number]):
        log = folder / f"{place}.log" if number else None
        results.append(run_group(group, folder / f"{place}.xml", environment, log))
    return results


def failures(report: Path) -> list[str]:
    """Return a line for each failed test of a JUnit report; none if pytest wrote no report."""
    if not report.exists():
        return []
    cases = ElementTree.parse(report).iter("testcase")
    failed = (case for case in cases if case.find("failure") is not None or case.find("error") is not None)
    return [f"    {case.get('classname')}::{case.get('name')}" for case in failed]


def main() -> int:
    # Ray's sockets lie in its folder, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ti", dir="/tmp") as name, ThreadPoolExecutor(len(LANES)) as threads:
        folders = [Path(name) / str(number) for number in range(len(LANES))]
        for folder in folders:
            folder.mkdir()
        results = [result for lane in threads.map(run_lane, range(len(LANES)), folders) for result in lane]
    sys.stdout.write("\n" + "\n".join(summary for _, summary in results) + "\n")
    return 1 if any(code for code, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
