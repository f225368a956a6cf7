"""Several nodes with GPUs that are not there: who gets actors, what an autoscaler sees, and nodes that come and go."""

from __future__ import annotations

import contextlib
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

from pipeline.store.parquet import read_table
from tests.e2e.on_nodes import HELD_FROM_STEP
from tests.pipeline.runs import tiny_toml, write_manifest, write_photo
from tests.pipeline.s3_server import S3Server

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

    def add(self, gpus: int = 1) -> Any:
        return self.cluster.add_node(num_cpus=1, num_gpus=gpus)

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    @contextlib.contextmanager
    def taking_back(self, node: Any, seconds: float, *, early: bool = False) -> Iterator[None]:
        """As a cloud does: a notice, what happens meanwhile, and the end, if not `early` no sooner than was said."""
        deadline = time.time() + seconds
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = self._gcs.drain_node(node.node_id, reason, "spot", int(1000 * deadline))
        assert accepted, why
        yield
        if not early:
            time.sleep(max(0.0, deadline + 0.5 - time.time()))
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


def _rows(fs: Any, path: str) -> list[dict[str, Any]]:
    with fs.open(path) as file:
        return read_table(file).to_pylist()


def _wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.stderr.read()[-3000:] if process.stderr else ""
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
    return found


@pytest.mark.timeout(900)
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
    with nodes.taking_back(preempted, seconds=600, early=True):  # which Ray takes for a node that died
        _wait_for(lambda: nodes.gpus_asked_for() == 1, driver)  # another actor before this one is gone
    third = nodes.add()
    _wait_for(lambda: third.node_id in calls(), driver)

    given = calls()
    assert all(len(given[node.node_id]) == 1 for node in (lost, preempted, first, second, third))
    ((_, victim),), ((_, moved),) = given[lost.node_id], given[preempted.node_id]
    for name in {"nap-0", "nap-1", "nap-2", "nap-3"} - {moved}:
        (tmp_path / f"end.{name}").touch()

    def elsewhere() -> list[tuple[str, int]]:
        """Nodes, with the attempt, that were given the concept of the preempted one: the third, unless that was ready
        before the driver knew of the other's end, and took what had waited."""
        nodes_with = ((node, attempt) for node, names in calls().items() for attempt, name in names if name == moved)
        return [(node, attempt) for node, attempt in nodes_with if node != preempted.node_id]

    ((where, attempt),) = _wait_for(elsewhere, driver)
    assert attempt == 1
    others = {first.node_id, second.node_id, third.node_id} - {where}
    _wait_for(lambda: nodes.idle() >= others, driver)  # an autoscaler may have them back, while one concept still runs
    assert where not in nodes.idle()

    (tmp_path / f"end.{moved}").touch()
    said, errors = driver.communicate(timeout=150)
    assert driver.returncode == 0, errors[-3000:]
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("[")]  # Ray writes there, too
    ended = {name: (status, attempts) for name, status, attempts in lines}
    assert {status for status, _ in ended.values()} == {"done"}
    assert ended[victim][1] == 2
    assert ended[moved][1] == 1  # a node that is taken back counts against nobody


@pytest.mark.timeout(900)
def test_what_a_node_with_notice_has_begun_goes_on_elsewhere(nodes: Nodes, tiny_model: Path, tmp_path: Path) -> None:
    """Two slots, one call ahead of them, four concepts: two have begun, one is handed back, one never comes near."""
    output = tmp_path / "out"
    actors = {"count": 1, "slots": 2, "calls_ahead": 1, "checkpoint_steps": 5, "max_attempts": 1}
    settings = {"device": "cuda", "actors": actors, "inversion": {"steps": HELD_FROM_STEP + 50, "batch_size": 2}}
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model, **settings))
    manifest = write_manifest(tmp_path, ["a", "b", "c", "d"])
    first = nodes.add()
    (tmp_path / f"slow.{first.node_id}").touch()
    run = _start(nodes, "run_command", str(manifest), "--config", str(tmp_path / "job.toml"), "--output", str(output))

    def told(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for path in output.glob(f"concepts/{name}/*/log.jsonl") for line in path.open()]

    def had(what: str) -> set[str]:
        return {name for name in "abcd" if any(line["message"].startswith(what) for line in told(name))}

    _wait_for(lambda: len(had("checkpoint")) == 2, run)
    with nodes.taking_back(first, seconds=10):
        _wait_for(lambda: had("handed back"), run)
        _wait_for(lambda: nodes.gpus_asked_for() == 1, run)
        spare = nodes.add()
        _wait_for(lambda: list(tmp_path.glob(f"load.{spare.node_id}.*")), run)
        assert not had("published")
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]
    assert "4 learned, 0 done before, 0 failed" in said

    (process,) = (int(path.name.rpartition(".")[2]) for path in tmp_path.glob(f"load.{spare.node_id}.*"))
    (handed_back,) = had("handed back")
    for name in "abcd":
        begins, prepared, published = (
            [line for line in told(name) if line["message"] == what] for what in ("begins", "prepared", "published")
        )
        assert len(begins) == (1 if name == "d" else 2)
        assert begins[-1]["process"] == process
        assert {line["attempt"] for line in begins} == {1}  # it counts against nobody
        assert (prepared[-1]["step"] > 0) == (name not in ("d", handed_back))
        assert len(published) == 1
    assert len(list(output.glob("concepts/*/*/record.json"))) == 4
    assert not list(output.glob("concepts/*/*/checkpoint.safetensors"))


@pytest.mark.timeout(900)
def test_a_run_on_several_nodes_shares_nothing_but_its_store(
    s3_server: S3Server, bucket: str, nodes: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    """Manifest, photos and output in S3; the nodes join when the run already waits for them. Two have a GPU and learn
    and draw, one has none."""
    here = tmp_path / "here"
    here.mkdir()
    fs = fsspec.filesystem("s3", **s3_server.options, skip_instance_cache=True)
    names = ["a", "b", "c", "d"]
    for number, name in enumerate(names):
        photo = write_photo(tmp_path / f"{name}.png", number)
        fs.pipe_file(f"{bucket}/photos/{name}.png", Path(photo).read_bytes())
    with fs.open(f"{bucket}/manifest.parquet", "wb") as file:
        pq.write_table(pa.table({"concept_id": names, "images": [[f"photos/{name}.png"] for name in names]}), file)
    prompts = [f"a photo of a {{}} {place}" for place in ("at sea", "on Mars", "in snow", "in bed", "at work", "")]
    fs.pipe_file(f"{bucket}/prompts.txt", "\n".join(prompts).encode())
    settings = {"device": "cuda", "actors": {"count": 2}, "photos": {"schemes": ["s3"]}, "inversion": {"steps": 60}}
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model, **settings))
    arguments = ["--config", str(tmp_path / "job.toml"), "--prompts", f"{bucket}/prompts.txt"]
    run = _start(nodes, "run_command", f"{bucket}/manifest.parquet", *arguments, "--output", f"{bucket}/out", cwd=here)
    _wait_for(lambda: nodes.gpus_asked_for() == 2, run)
    joined = {nodes.add().node_id, nodes.add().node_id}
    nodes.add(gpus=0)
    said, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors[-3000:]
    assert "4 learned, 0 done before, 0 failed" in said
    assert "pictures: 24 drawn, 0 done before, 0 failed" in said

    for what in ("load", "draw"):
        loads = Counter(path.name.split(".")[1] for path in tmp_path.glob(f"{what}.*"))
        assert loads == dict.fromkeys(joined, 1)  # the model once a node, for all its concepts and for all pictures
    calls = [len(path.read_text()) for path in tmp_path.glob("draw.*")]
    assert min(calls) >= 1
    assert sum(calls) == 6  # 24 pictures, four a call
    rows = [row for path in fs.glob(f"{bucket}/out/images/metadata/*.parquet") for row in _rows(fs, path)]
    assert len(rows) == len({(row["concept_id"], row["prompt"]) for row in rows}) == 24
    out = f"{bucket.removeprefix('s3://')}/out"
    assert {f"{out}/{row['path']}" for row in rows} == set(fs.glob(f"{out}/images/*/*.png"))
    assert len(fs.glob(f"{out}/concepts/*/*/record.json")) == 4
    assert fs.exists(f"{out}/report.html")
    assert not list(here.iterdir())
