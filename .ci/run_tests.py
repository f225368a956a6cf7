"""Run every group of tests in a pytest process of its own, the fast group first, and repeat at the end what failed.

A failure in one group does not keep the later groups from running. Exits with 1 if a group failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

GROUPS = ("not slow", "slow and not own_cluster", "own_cluster")


def run_group(marks: str, report: Path) -> tuple[int, str]:
    """Run one group and return pytest's exit code and the lines that summarise it."""
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "pytest", "tests", "-m", marks, f"--junit-xml={report}"]).returncode
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    heading = f"{'passed' if code == 0 else f'FAILED (exit code {code})'} in {minutes}:{seconds:02d}: {marks}"
    return code, "\n".join([heading, *failures(report)])


def failures(report: Path) -> list[str]:
    """Return a line for each failed test of a JUnit report; none if pytest wrote no report."""
    if not report.exists():
        return []
    cases = ElementTree.parse(report).iter("testcase")
    failed = (case for case in cases if case.find("failure") is not None or case.find("error") is not None)
    return [f"    {case.get('classname')}::{case.get('name')}" for case in failed]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = [run_group(marks, Path(folder, f"{number}.xml")) for number, marks in enumerate(GROUPS)]
    sys.stdout.write("\n" + "\n".join(summary for _, summary in results) + "\n")
    return 1 if any(code for code, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
