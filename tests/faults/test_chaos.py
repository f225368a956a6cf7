"""Sixty concepts through a bad night: workers killed at random, a node lost and another joined, the driver killed and
the command run again; then the same for their pictures. Everything comes out once, with the bytes of a calm night."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from pipeline.actors import Learner
from pipeline.config import RunConfig, load_config
from pipeline.generate import Drawer
from pipeline.manifest import read_manifest
from pipeline.plan import ConceptTask
from pipeline.publish import to_png
from pipeline.records import from_json
from pipeline.run import make_plan
from pipeline.storage import RunStore
from tests.faults.processes import descendants, kill
from tests.pipeline.runs import tiny_toml, write_manifest
from textual_inversion.slots import SlotState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS, STEPS, INTERVAL, KILLS = 60, 16, 4, 5
PROMPTS = ("a photo of a {}", "a rendering of a {}")
SETTINGS = {
    "inversion": {"steps": STEPS, "batch_size": 2},
    "actors": {"count": 2, "slots": 2, "checkpoint_steps": INTERVAL, "max_attempts": 12},
    "generation": {"sampling": {"steps": 4, "batch_size": 4, "guidance_scale": 2.0}, "rows_per_part": 8},
}
LEARNED = ("learned_embeds.safetensors", "curve.parquet", "grid.png")

log = logging.getLogger(__name__)


@dataclass
class Night:
    """A command under a cluster that lives in this process, and what is done to both."""

    cluster: Cluster
    nodes: list[Any]
    command: list[str]
    output: Path
    seed: int = field(default_factory=lambda: random.randrange(2**32))
    driver: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        log.warning("this night's seed: %d", self.seed)

    def start(self) -> None:
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address, "OMP_NUM_THREADS": "1"}
        self.driver = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self) -> str:
        """What it said."""
        assert self.driver is not None
        said, _ = self.driver.communicate(timeout=400)
        assert self.driver.returncode == 0, said[-5000:]
        return said

    def await_change(self, seen: Callable[[], object]) -> None:
        """Until something has come of the work since the last kill; then a while more, at random."""
        before, until = seen(), time.monotonic() + 240
        while seen() == before:
            assert self.driver is not None
            assert self.driver.poll() is None, self.driver.communicate()[0][-5000:]
            assert time.monotonic() < until, "nothing comes of it any more"
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, 1.0))

    def kill_one(self, title: str) -> None:
        if found := descendants(title):
            kill(self.random.choice(found))

    def kill_driver(self) -> None:
        assert self.driver is not None
        kill(self.driver.pid)
        self.driver.communicate()

    def replace_node(self) -> None:
        """One is gone without notice, another comes."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=2))


@pytest.fixture(scope="module")
def night(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    folder = tmp_path_factory.mktemp("night")
    manifest = write_manifest(folder, [f"c{i:02d}" for i in range(CONCEPTS)])
    (folder / "job.toml").write_text(tiny_toml(tiny_model, **SETTINGS))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    soon = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    )
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        output = folder / "out"
        command = [sys.executable, "-m", "pipeline.run", str(manifest), "--output", str(output),
                   "--config", str(folder / "job.toml")]  # fmt: skip
        yield Night(cluster, nodes, command, output)
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def config(night: Night) -> RunConfig:
    """The job's, as it resolves, but on an output where nothing happens."""
    toml = Path(night.command[-1]).read_text()
    return load_config(toml, manifest=night.command[3], output=str(night.output.parent / "calm"), device="cpu")


@pytest.fixture(scope="module")
def calm(config: RunConfig) -> RunStore:
    """All concepts learned in this process."""
    store = RunStore(config.output)
    plan, _ = make_plan(config, store)
    tasks = list(plan.tasks(read_manifest(config.manifest)))

    async def together(learner: Learner, tasks: list[ConceptTask]) -> None:
        await asyncio.gather(*(learner.learn(task) for task in tasks))

    unsaved = dataclasses.replace(config.actors, checkpoint_steps=0)
    learner = Learner(dataclasses.replace(config, actors=unsaved))
    asyncio.run(together(learner, tasks))
    learner.close()
    return store


def records(night: Night) -> list[Path]:
    return sorted(night.output.glob("concepts/*/*/record.json"))


def saved_steps(night: Night) -> dict[str, int]:
    """Concept -> the step its checkpoint is of."""
    found = {}
    for path in night.output.glob("concepts/*/*/checkpoint.safetensors"):
        try:
            found[path.parts[-3]] = SlotState.from_bytes(path.read_bytes()).step
        except FileNotFoundError:  # it has just been learned
            continue
    return found


def log_of(record: Path) -> list[dict[str, Any]]:
    """What was noted of a concept, attempt after attempt."""
    return [json.loads(line) for line in (record.parent / "log.jsonl").read_text().splitlines()]


def test_sixty_concepts(night: Night, calm: RunStore) -> None:
    def progress() -> object:
        return len(records(night)), saved_steps(night)

    night.start()
    saved: dict[str, int] = {}
    before: list[int] = []
    for number in range(KILLS):
        night.await_change(progress)
        if number == 2:
            night.replace_node()
        elif number == 3:
            before = descendants("ray::Learner")
            night.kill_driver()
            saved = saved_steps(night)
            night.start()
        else:
            night.kill_one("ray::Learner")
    said = night.end()
    assert " 0 failed, 0 bad rows" in said

    found = [from_json(path.read_bytes()) for path in records(night)]
    assert sorted(record.concept_id for record in found) == [f"c{i:02d}" for i in range(CONCEPTS)]
    assert {record.status for record in found} == {"done"}
    for path in records(night):
        relative = path.parent.relative_to(night.output)
        for name in LEARNED:
            assert (path.parent / name).read_bytes() == calm.get(f"{relative}/{name}"), (relative, name)
        told = log_of(path)
        assert Counter(line["message"] for line in told)["published"] == 1, told
        if [line["process"] for line in told if line["message"] == "begins"][-1] not in before:
            step = [line["step"] for line in told if line["message"] == "prepared"][-1]
            assert step >= saved.get(path.parts[-3], 0), "what was saved is gone on from"
    table = pq.read_table(night.output / "results.parquet", columns=["concept_id", "status"])
    assert Counter(table["status"].to_pylist()) == {"done": CONCEPTS}
    assert not list(night.output.glob("**/lease.json"))


def test_their_pictures(night: Night, config: RunConfig) -> None:
    assert len(records(night)) == CONCEPTS, "learned by the test before"
    night.command += ["--prompts", str(night.output.parent / "prompts.txt")]

    def progress() -> object:
        return len(list(night.output.glob("images/c*/*.png")))

    night.start()
    for number in range(3):
        night.await_change(progress)
        if number == 1:
            night.kill_driver()
            night.start()
        else:
            night.kill_one("ray::MapWorker")
    said = night.end()
    assert " 0 failed" in next(line for line in said.splitlines() if line.startswith("pictures:"))

    rows = [row for row in pq.read_table(night.output / "images" / "metadata").to_pylist() if row["status"] == "ok"]
    assert len(rows) == CONCEPTS * len(PROMPTS)
    assert len({row["row_id"] for row in rows}) == len(rows), "no picture is told of twice"
    pictures = {str(path.relative_to(night.output)) for path in night.output.glob("images/c*/*.png")}
    assert pictures == {row["path"] for row in rows}
    drawer = Drawer(dataclasses.replace(config, output=str(night.output)))
    sample = rows[:: len(rows) // 24]
    wanted = [row | {"embedding": f"concepts/{row['concept_id']}/{row['fingerprint']}/{LEARNED[0]}"} for row in sample]
    for row, drawn in zip(sample, drawer.draw(wanted, config.generation.sampling), strict=True):
        assert not isinstance(drawn, str), drawn
        assert (night.output / row["path"]).read_bytes() == to_png(drawn)
