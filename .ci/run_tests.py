"""Run every group of tests in a pytest process of its own, and repeat at the end what failed.

The fast group needs one core and runs beside the others, which use Ray, one after the other, and often wait. Its output
is written when it ends. A failure in one group does not keep the others from running. Exits with 1 if a group failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FAST = "not slow"
OTHERS = ("slow and not own_cluster", "own_cluster")


def run_group(marks: str, report: Path, log: Path | None = None) -> tuple[int, str]:
    """Run one group and return pytest's exit code and the lines that summarise it.

    pytest's output goes to the terminal; with `log`, it is kept in that file and written when the group has ended.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "tests", "-m", marks, f"--junit-xml={report}"]
    if log is None:
        code = subprocess.run(command).returncode
    else:
        with log.open("wb") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        sys.stdout.write("\n" + log.read_text(errors="replace"))
        sys.stdout.flush()
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
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as beside:
        folder = Path(name)
        fast = beside.submit(run_group, FAST, folder / "fast.xml", folder / "fast.log")
        others = [run_group(marks, folder / f"{number}.xml") for number, marks in enumerate(OTHERS)]
        results = [fast.result(), *others]
    sys.stdout.write("\n" + "\n".join(summary for _, summary in results) + "\n")
    return 1 if any(code for code, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
