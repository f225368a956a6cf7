"""The command on a cluster that is already running: joined from beside it, and submitted to its job server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.pipeline.runs import tiny_toml, write_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    jobs: JobSubmissionClient


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard = _free_port(), _free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
               "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0",
               "--disable-usage-stats"]  # fmt: skip
    with open(Path(folder) / "head.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Head(f"127.0.0.1:{port}", _job_client(f"http://127.0.0.1:{dashboard}", process))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _job_client(address: str, process: subprocess.Popen[bytes]) -> JobSubmissionClient:
    """Once the job server answers."""
    for _ in range(120):
        assert process.poll() is None, "the head node ended"
        try:
            client = JobSubmissionClient(address)
            client.list_jobs()
        except (ConnectionError, RuntimeError):
            time.sleep(0.5)
        else:
            return client
    raise TimeoutError("the job server did not answer within a minute")


def _arguments(tiny_model: Path, folder: Path, names: list[str]) -> list[str]:
    manifest = write_manifest(folder, names)
    (folder / "job.toml").write_text(tiny_toml(tiny_model, actors={"count": 1}))
    return [str(manifest), "--config", str(folder / "job.toml"), "--output", str(folder / "out")]


def test_a_running_cluster_is_joined(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", *_arguments(tiny_model, tmp_path, ["a", "b"])]
    environment = os.environ | {"RAY_ADDRESS": head.address}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("2 learned")
    assert len(head.jobs.list_jobs()) == 1  # the driver was this cluster's, not one of its own


def test_a_submitted_job_runs_and_fails_as_a_command_does(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    arguments = _arguments(tiny_model, tmp_path, ["a", "bad"])
    (tmp_path / "photos" / "bad-0.png").write_bytes(b"not a picture")
    entrypoint = " ".join([sys.executable, "-m", "pipeline.run", *arguments])
    job = head.jobs.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    deadline = time.monotonic() + 250
    while not (status := head.jobs.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, head.jobs.get_job_logs(job)[-3000:]
        time.sleep(1)
    log = head.jobs.get_job_logs(job)
    assert status == JobStatus.FAILED
    assert "1 learned, 0 done before, 1 failed" in log
    assert "FAILED bad: photo " in log
