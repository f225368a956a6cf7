"""What Ray Data says about its own work does not reach the terminal; all else does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pipeline.bulk import quiet

HARMLESS = (
    b"[2026-11-27 23:47:40,100 E 11898 11898] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches)' and "
    b"ID: '2352' has constructor arguments in the object store and max_restarts > 0. See "
    b"https://github.com/ray-project/ray/issues/53727 for more details.\n"
)
TELLING = b"[2026-11-27 23:47:40,100 E 11898 11898] core_worker.cc:2465: the object store is full\n"


def test_native_lines_about_ray_alone_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet._without(quiet._HARMLESS):
        os.write(2, b"a " + HARMLESS + TELLING)
        os.write(2, HARMLESS)
        os.write(2, b"half a line")
    os.write(2, HARMLESS)
    told = capfd.readouterr().err
    assert told.count("53727") == 1, "after the block"
    assert re.sub(r"\n\[.* E 11898.*53727.*\n", "\n", told).startswith(f"a {TELLING.decode()}half a line")


def test_pythons_own_lines_are_written_at_once_and_stderr_is_as_before() -> None:
    script = """
import os, sys
from pipeline.bulk import quiet
before = sys.stderr
with quiet._without(quiet._HARMLESS):
    assert sys.stderr is not before
    sys.stderr.write("progress \\u2714")
    sys.stderr.flush()
assert sys.stderr is before
sys.stderr.write(" after\\n")
with quiet._without(quiet._HARMLESS):
    sys.stderr.write("the last words")
    sys.stderr.flush()
    os._exit(3)
"""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 3
    assert done.stderr.decode() == "progress \u2714 after\nthe last words"


@pytest.mark.slow
def test_ray_data_says_nothing_of_its_own_work() -> None:
    """In a process of its own, in which Ray Data has not yet set up its log."""
    program = """
import logging
from pipeline.bulk.quiet import quiet_ray_data
with quiet_ray_data():
    import ray.data
    logging.getLogger("ray.data").info("Starting execution")
    logging.getLogger("ray.data._internal.progress").warning("Progress bars disabled")
    logging.getLogger("ray.data").warning("a block is lost")
    taken = "The Ray cluster currently does not have any available CPUs. The Dataset job will hang unless"
    logging.getLogger("ray.data.dataset").warning(taken)
    logging.getLogger("ray.data.dataset").warning("rows are lost")
logging.getLogger("ray.data.dataset").warning("CPUs after the block")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "a block is lost" in done.stderr
    assert "rows are lost" in done.stderr
    assert "available CPUs" not in done.stderr + done.stdout
    assert "CPUs after the block" in done.stderr
    assert "Starting" not in done.stderr + done.stdout
    assert "Progress" not in done.stderr + done.stdout
