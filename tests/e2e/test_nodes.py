"""Several nodes with GPUs that are not there: who gets actors, what an autoscaler sees, and nodes that come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.pipeline.runs import tiny_toml, write_photo
from tests.pipeline.s3_server import serve_s3

pytestmark = [pytest.mark.slow, pytest.mark.own_cluster]

ROOT = Path(__file__).resolve().parents[2]

HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
"""A node that is gone is known to be within seconds, not within half a minute."""


class Nodes:
    """A cluster whose head takes no work, and what its autoscaler would see."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        )
        self._gcs = GcsClient(address=self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, num_gpus=1)

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def preempt(self, node: Any) -> None:
        """As a cloud takes a node back: a notice, then the end."""
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline_ms = int(1000 * (time.time() + 1))
        accepted, why = self._gcs.drain_node(node.node_id, reason, "spot", deadline_ms)
        assert accepted, why
        time.sleep(1)
        self.kill(node)

    def state(self) -> Any:
        state = autoscaler_pb2.GetClusterResourceStateReply()
        state.ParseFromString(self._gcs.get_cluster_resource_state())
        return state.cluster_resource_state

    def gpus_asked_for(self) -> float:
        """By actors that have no node."""
        requests = self.state().pending_resource_requests
        return sum(request.count * request.request.resources_bundle["GPU"] for request in requests)

    def idle(self) -> set[str]:
        """Nodes with a GPU that do nothing."""
        alive = [node for node in self.state().node_states if node.total_resources.get("GPU")]
        return {node.node_id.hex() for node in alive if node.available_resources.get("GPU") and node.idle_duration_ms}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NODES_NOTES", str(tmp_path))
    found = Nodes()
    yield found
    found.cluster.shutdown()


def _start(nodes: Nodes, function: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from tests.e2e import on_nodes; on_nodes.{function}()", *arguments]
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address} | options.pop("env", {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def _wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.stderr.read()[-3000:] if process.stderr else ""
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
    return found


@pytest.mark.timeout(400)
def test_nodes_come_and_go(nodes: Nodes, tmp_path: Path) -> None:
    """Four concepts for three actors; each node is given back or taken away while one of them runs there."""
    driver = _start(nodes, "nap", str(tmp_path), "3", "nap-0", "nap-1", "nap-2", "nap-3")

    def calls() -> dict[str, list[tuple[int, str]]]:
        """Node -> the concepts it was given, with their attempt."""
        found: dict[str, list[tuple[int, str]]] = {}
        for path in tmp_path.glob("on.*"):
            _, name, attempt, node = path.name.split(".")
            found.setdefault(node, []).append((int(attempt), name))
        return found

    _wait_for(lambda: nodes.gpus_asked_for() == 3, driver)  # an actor for each GPU that it can use, no more
    lost, preempted = nodes.add(), nodes.add()
    _wait_for(lambda: set(calls()) == {lost.node_id, preempted.node_id}, driver)
    _wait_for(lambda: nodes.gpus_asked_for() == 1, driver)

    nodes.kill(lost)
    first, second = nodes.add(), nodes.add()
    _wait_for(lambda: {first.node_id, second.node_id} <= set(calls()), driver)
    nodes.preempt(preempted)
    third = nodes.add()
    _wait_for(lambda: third.node_id in calls(), driver)

    given = calls()
    assert all(len(given[node.node_id]) == 1 for node in (lost, preempted, first, second, third))
    ((_, victim),), ((_, moved),) = given[lost.node_id], given[preempted.node_id]
    left = {"nap-0", "nap-1", "nap-2", "nap-3"} - {moved}
    assert sorted(attempt for names in given.values() for attempt, name in names if name == moved) == [1, 1], given
    (where,) = [node for node, names in given.items() if (1, moved) in names and node != preempted.node_id]
    for name in left:
        (tmp_path / f"end.{name}").touch()
    others = {first.node_id, second.node_id, third.node_id} - {where}
    _wait_for(lambda: nodes.idle() >= others, driver)  # an autoscaler may have them back, while one concept still runs
    assert where not in nodes.idle()

    (tmp_path / f"end.{moved}").touch()
    said, errors = driver.communicate(timeout=60)
    assert driver.returncode == 0, errors[-3000:]
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("[")]  # Ray writes there, too
    ended = {name: (status, attempts) for name, status, attempts in lines}
    assert {status for status, _ in ended.values()} == {"done"}
    assert ended[victim][1] == 2
    assert ended[moved][1] == 1  # a node that is taken back counts against nobody


@pytest.mark.timeout(400)
def test_a_run_on_two_nodes_shares_nothing_but_its_store(
    nodes: Nodes, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest, photos and output in S3; the nodes join when the run already waits for them."""
    here = tmp_path / "here"
    here.mkdir()
    with serve_s3(tmp_path) as server:
        bucket = server.make_bucket("catalog")
        fs = fsspec.filesystem("s3", **server.options)
        names = ["a", "b", "c", "d"]
        for number, name in enumerate(names):
            photo = write_photo(tmp_path / f"{name}.png", number)
            fs.pipe_file(f"catalog/photos/{name}.png", Path(photo).read_bytes())
        with fs.open("catalog/manifest.parquet", "wb") as file:
            pq.write_table(pa.table({"concept_id": names, "images": [[f"photos/{name}.png"] for name in names]}), file)
        settings = {"device": "cuda", "actors": {"count": 2}, "photos": {"schemes": ["s3"]}, "inversion": {"steps": 60}}
        (tmp_path / "job.toml").write_text(tiny_toml(tiny_model, **settings))
        arguments = [f"{bucket}/manifest.parquet", "--config", str(tmp_path / "job.toml"), "--output", f"{bucket}/out"]
        run = _start(nodes, "run_command", *arguments, cwd=here, env=server.environment)
        _wait_for(lambda: nodes.gpus_asked_for() == 2, run)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        joined = {nodes.add().node_id, nodes.add().node_id}
        said, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors[-3000:]
        assert "4 learned, 0 done before, 0 failed" in said
        loads = Counter(path.name.split(".")[1] for path in tmp_path.glob("load.*"))
        assert loads == dict.fromkeys(joined, 1)  # the model once a node, for all its concepts
        assert len(fs.glob("catalog/out/concepts/*/*/record.json")) == 4
        assert fs.exists("catalog/out/report.html")
    assert not list(here.iterdir())
