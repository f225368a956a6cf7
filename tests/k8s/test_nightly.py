"""The nightly's script against a small API server of RayJobs on this machine."""

from __future__ import annotations

import datetime
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.k8s.render import K8S

TODAY = datetime.date(2026, 11, 21)
ENVIRONMENT = {"TEMPLATE": "concepts", "OWNER_NAME": "nightly-1", "OWNER_UID": "abc", "QUEUE": ""}
PATH = "/apis/ray.io/v1/namespaces/ns/rayjobs"


class Cluster(ThreadingHTTPServer):
    """RayJobs by name; a created one walks through `script`, a step each time it is asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.script: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    def add(self, name: str, **status: Any) -> None:
        metadata = {"name": name, "labels": {"part": "x"}, "uid": "u", "resourceVersion": "1"}
        spec = {"entrypoint": "python", "suspend": True, "backoffLimit": 2}
        self.jobs[name] = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": metadata,
            "spec": spec,
            "status": status,
        }


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        name = self.path.removeprefix(PATH).strip("/")
        if not name:
            self._answer(200, {"items": list(self.server.jobs.values())})
        elif name not in self.server.jobs:
            self._answer(404, {})
        else:
            job = self.server.jobs[name]
            if name != "concepts" and self.server.script:
                job = job | {"status": self.server.script.pop(0)}
            self._answer(200, job)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        taken = name in self.server.jobs
        self.server.jobs.setdefault(name, body)
        self._answer(409 if taken else 201, body)

    def log_message(self, *_: object) -> None: ...

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def start_run() -> ModuleType:
    path = K8S / "components" / "nightly" / "start_run.py"
    spec = importlib.util.spec_from_file_location("start_run", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    server = Cluster()
    server.add("concepts", jobDeploymentStatus="Suspended")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def night(
    start_run: ModuleType, cluster: Cluster, account: Path, environment: dict[str, str] = ENVIRONMENT
) -> tuple[int, str]:
    """(exit code, what was said) of a night that never sleeps."""
    (account / "token").write_text("secret\n")
    said: list[str] = []
    jobs = start_run.RayJobs(f"http://127.0.0.1:{cluster.server_address[1]}", "ns", account)
    return start_run.run(jobs, environment, TODAY, lambda: None, said.append), "".join(said)


def test_copies_the_template_and_waits(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.script = [
        {},
        {"jobDeploymentStatus": "Running"},
        {"jobDeploymentStatus": "Retrying"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    ]
    code, said = night(start_run, cluster, tmp_path)
    assert code == 0
    assert [line.partition(": ")[2] for line in said.splitlines()[1:]] == ["New", "Running", "Retrying", "Complete"]
    made = cluster.jobs["concepts-20261121"]
    assert made["spec"] == {"entrypoint": "python", "suspend": False, "backoffLimit": 2}
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-1", "uid": "abc"}
    ]
    assert made["metadata"]["labels"] == {"part": "x"}
    assert set(made["metadata"]) == {"name", "labels", "ownerReferences"}
    assert cluster.tokens == {"Bearer secret"}


def test_started_again_goes_on_waiting(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.add("concepts-20261121", jobDeploymentStatus="Running")
    before = cluster.jobs["concepts-20261121"]
    cluster.script = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    code, said = night(start_run, cluster, tmp_path)
    assert code == 0
    assert "is there already" in said
    assert cluster.jobs["concepts-20261121"] is before


def test_a_failed_run_fails_the_night_with_its_reason(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.script = [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "m"}]
    code, said = night(start_run, cluster, tmp_path)
    assert code == 3
    assert "AppFailed m" in said


def test_a_stopped_run_is_no_success(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.script = [{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}]
    assert night(start_run, cluster, tmp_path)[0] == 3


def test_never_two_at_a_time(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.add("concepts-20261119", jobDeploymentStatus="Complete")
    cluster.add("concepts-20261120", jobDeploymentStatus="Running")
    code, said = night(start_run, cluster, tmp_path)
    assert code == 3
    assert said == "not started: concepts-20261120 is Running\n"
    assert "concepts-20261121" not in cluster.jobs


def test_queue_of_kueue(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    cluster.script = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    night(start_run, cluster, tmp_path, ENVIRONMENT | {"QUEUE": "nights"})
    assert cluster.jobs["concepts-20261121"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "nights"


def test_no_template(start_run: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    """Raised, so that the pod ends with 1 and is tried again: the template may be on its way."""
    cluster.jobs.clear()
    with pytest.raises(start_run.urllib.error.HTTPError, match="404"):
        night(start_run, cluster, tmp_path)
