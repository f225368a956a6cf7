"""Stopped from outside: by a scheduler, and by a person at a terminal, who may be in a hurry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import driver
from pipeline.exit_codes import OK, STOPPED
from pipeline.run import main
from tests.faults.held import hold_of
from tests.faults.processes import descendants, kill
from tests.pipeline.runs import tiny_toml, write_manifest
from textual_inversion.slot_state import SlotState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parents[2]
SLACK_S = 40.0
"""For a loaded machine, beside what is stated."""


def command(folder: Path, model: Path, *, steps: int, drain_s: float) -> list[str]:
    actors = {"count": 1, "slots": 2, "checkpoint_steps": 20, "drain_s": drain_s}
    (folder / "job.toml").write_text(tiny_toml(model, inversion={"steps": steps, "batch_size": 2}, actors=actors))
    manifest = write_manifest(folder, ["a", "b", "c"])
    return [str(manifest), "--output", str(folder / "out"), "--config", str(folder / "job.toml")]


def await_that(holds: Callable[[], object], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def saved(output: Path) -> list[Path]:
    return list(output.glob("concepts/*/*/checkpoint.safetensors"))


def test_ctrl_c_in_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    """It reaches every process of the group; the run ends in good order all the same, within the time it states."""
    arguments, output = command(tmp_path, tiny_model, steps=60, drain_s=20.0), tmp_path / "out"
    hold_of(output).write_text("0")
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-c", "from tests.faults.held import main; main()", *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    await_that(lambda: saved(output))
    began = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    said, errors = run.communicate(timeout=200)
    assert time.monotonic() - began < 20.0 + 5.0 + SLACK_S
    assert run.returncode == STOPPED, said + errors[-3000:]
    assert "stopped before the end; run the same command again to continue" in said
    assert all(SlotState.from_bytes(path.read_bytes()).step > 0 for path in saved(output))
    assert not (output / "lease.json").exists()
    assert main(arguments) == OK
    assert len(list(output.glob("concepts/*/*/record.json"))) == 3


def test_ctrl_c_twice_ends_it_now(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = command(tmp_path, tiny_model, steps=100_000, drain_s=600.0), tmp_path / "out"
    times: list[float] = []
    stopped: list[int] = []
    is_draining = threading.Event()
    drain = driver._Schedule.drain

    def noted(schedule: driver._Schedule) -> Iterator[driver.Ended]:
        is_draining.set()
        return drain(schedule)

    monkeypatch.setattr(driver._Schedule, "drain", noted)

    def interrupt() -> None:
        await_that(lambda: saved(output))
        (learner,) = descendants("ray::ModelActor")
        stopped.append(learner)
        os.kill(learner, signal.SIGSTOP)  # it will not answer
        os.kill(os.getpid(), signal.SIGINT)
        await_that(is_draining.is_set)  # two signals at once would be one
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert main(arguments) == STOPPED
        assert time.monotonic() - times[0] < SLACK_S
    finally:
        for learner in stopped:
            kill(learner)
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err
    assert not list(output.glob("concepts/*/*/record.json"))
    assert not (output / "lease.json").exists()
