"""The command on a cluster that is already running: joined from beside it, and submitted to its job server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.prometheus import exported_names
from tests.faults.held import hold_of
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.pipeline.s3_server import free_ports
from tests.tiny_models import tiny_extractor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS, RECORDS = "concepts/*/*/checkpoint.safetensors", "concepts/*/*/record.json"
HELD = "from tests.faults.held import main; main()"
"""Program of a run that can be held."""
_RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    dashboard: str
    metrics: str
    """Where Prometheus would ask its node's agent."""
    jobs: JobSubmissionClient


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, metrics = free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    command = [_RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
               "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0",
               f"--metrics-export-port={metrics}", "--disable-usage-stats"]  # fmt: skip
    (Path(folder) / "here").mkdir()
    (Path(folder) / "here" / "tests").symlink_to(ROOT / "tests")  # which are not sent with a job
    python_path = os.pathsep.join([f"{folder}/here", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"RAY_metrics_report_interval_ms": "1000", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
                                "PYTHONPATH": python_path}  # fmt: skip
    with open(Path(folder) / "head.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        server = f"http://127.0.0.1:{dashboard}"
        yield Head(f"127.0.0.1:{port}", server, f"http://127.0.0.1:{metrics}", _job_client(server, process))
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


def _arguments(tiny_model: Path, folder: Path, names: list[str], **settings: Any) -> list[str]:
    manifest = write_manifest(folder, names)
    (folder / "job.toml").write_text(
        tiny_toml(tiny_model, **{"actors": {"count": 1, "slots": 1, "checkpoint_steps": 5}, **settings})
    )
    return [str(manifest), "--config", str(folder / "job.toml"), "--output", str(folder / "out")]


def _submit(head: Head, arguments: list[str], program: str = "", module: str = "pipeline.run") -> subprocess.Popen[str]:
    """`ray job submit` as the README prints it, in a checkout, or of another module or program: it follows the job's
    lines until its end."""
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (printed,) = re.findall(r"^    (ray job submit .*)$", readme, re.MULTILINE)
    before = shlex.split(printed)[: shlex.split(printed).index("pipeline.run") + 1]
    here = {"ray": _RAY, "http://HEAD:8265": head.dashboard, "python": sys.executable, "pipeline.run": module}
    command = [here.get(word, word) for word in before]
    command = [*command[:-2], "-c", program] if program else command
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def _wait_for(what: Callable[[], Any], every_s: float = 0.3) -> Any:
    deadline = time.monotonic() + 300
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(every_s)
    return found


def _series(head: Head) -> dict[str, str]:
    """Name -> the lines of every series of ours that Prometheus would be given."""
    try:
        with urllib.request.urlopen(f"{head.metrics}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:  # the agent is not up yet
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name = re.match(r"\w*", line)[0]  # type: ignore[index]
        if name in exported_names():
            found[name] = f"{found.get(name, '')}{line}\n"
    return found


def test_the_working_directory_is_sent_without_tests_and_history() -> None:
    excluders = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    assert len(excluders) == 2

    def is_sent(path: str) -> bool:
        return not any(excludes(ROOT / path) for excludes in excluders)

    sent = ("pipeline/run.py", "pipeline/recipes/demo.toml", "demo/model/model_index.json", "manifests/demo.parquet")
    left_out = (".git/HEAD", "tests/e2e/test_cluster.py", "benchmarks/jobs.py", "demo/world.py", "output/demo/run.json")
    assert [path for path in (*sent, *left_out) if is_sent(path)] == [*sent]


def test_a_job_refuses_an_output_that_ray_deletes(head: Head) -> None:
    submitted = _submit(head, ["manifests/demo.parquet"])
    said = submitted.communicate(timeout=300)[0]
    assert submitted.returncode != 0
    assert re.search(r"error: the output /\S+/output/demo lies in Ray's own copy of the job's working directory", said)
    assert "exit code 2" in said


@pytest.mark.timeout(1200)  # two jobs
def test_a_job_is_followed_scraped_stopped_and_resumed(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    """A bad concept and four good ones: when the first is learned the job is held, and stopped at leisure."""
    names = ["rose-window", "weather-vane", "door-knocker", "sundial"]
    inversion = {"steps": 100, "batch_size": 4}
    arguments = _arguments(tiny_model, tmp_path, ["bad", *names], inversion=inversion, log_format="json")
    output = tmp_path / "out"
    (tmp_path / "photos" / "bad-0.png").write_bytes(b"not a picture")

    submitted = _submit(head, arguments, HELD)
    _wait_for(lambda: list(output.glob(RECORDS)), every_s=0.02)
    hold_of(output).write_text("0")
    unusual = {"ray_concepts_retried_total", "ray_concepts_quarantined_total"}  # nothing was lost: no such series
    series: dict[str, str] = {}

    def has_all() -> bool:
        """Together: a gauge has no series in an interval in which it was not set."""
        series.update(_series(head))
        return exported_names() - unusual <= set(series)

    _wait_for(lambda: has_all() and list(output.glob(CHECKPOINTS)))
    (job,) = [job.submission_id for job in head.jobs.list_jobs() if job.status == JobStatus.RUNNING]
    assert job is not None
    subprocess.run([_RAY, "job", "stop", "--address", head.dashboard, job], check=True, timeout=300)
    lines = submitted.communicate(timeout=300)[0].splitlines()
    assert head.jobs.get_job_status(job) == JobStatus.STOPPED
    told = [json.loads(line) for line in lines if line.startswith("{")]
    progress = [line for line in told if line["logger"] == "progress"]
    assert progress[0]["message"].startswith("learning: 0/")
    done = progress[-1]["done"]
    assert 1 <= done < len(names)
    assert (progress[-1]["failed"], progress[-1]["retried"]) == (1, 0)
    assert any(line["message"].startswith("stopped before the end") for line in told)
    assert json.loads((output / "run.json").read_text())["stage"] == "stopped"
    (under_way,) = [path.parent for path in output.glob(CHECKPOINTS)]
    assert not {"bad", *names} & set(re.findall(r'="([^"]*)"', "".join(series.values())))
    assert " 1.0\n" in series["ray_concepts_failed_total"]
    assert float(series["ray_learner_steps_total"].split()[-1]) > 0  # as of the last report: it lags

    again = _submit(head, arguments)
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 1
    assert f"{len(names) - done} learned, {done} done before, 1 failed" in said
    assert "FAILED bad: photo " in said
    told = [json.loads(line) for line in (under_way / "log.jsonl").read_text().splitlines()]
    begun = [line["step"] for line in told if line["message"] == "prepared"]
    assert begun[0] == 0 < begun[1]  # it went on from where it was stopped


def test_a_running_cluster_is_joined(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", *_arguments(tiny_model, tmp_path, ["a", "b"])]
    environment, jobs_before = os.environ | {"RAY_ADDRESS": head.address}, len(head.jobs.list_jobs())
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("2 learned")
    assert len(head.jobs.list_jobs()) == jobs_before + 1  # the driver was this cluster's, not one of its own


@pytest.mark.timeout(900)  # reads photos by Ray Data, then starts Ray Train
def test_an_encoder_is_trained_by_a_job(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    """A second job finds it done."""
    small = {"hidden": 8, "patch_dim": 4, "grid_side": 2, "latent_side": 2}
    training = {"steps": 2, "concepts_per_step": 2, "samples_per_concept": 1}
    arguments = _arguments(
        tiny_model,
        tmp_path,
        ["a", "b", "c"],
        extractor=str(tiny_extractor("clip", tmp_path / "clip")),
        encoder={"network": small, "training": training},
    )
    submitted = _submit(head, arguments, module="pipeline.train_encoder")
    said = submitted.communicate(timeout=600)[0]
    assert submitted.returncode == 0
    output = tmp_path / "out"
    assert "2 concepts trained on, 1 held out, 0 left out; 2 steps (all steps)" in said
    assert json.loads((output / "encoder.json").read_text())["steps"] == 2
    assert (output / "report.html").exists()
    again = _submit(head, arguments, module="pipeline.train_encoder").communicate(timeout=600)[0]
    assert "trained before, nothing to do" in again
