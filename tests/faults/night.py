"""A command on a cluster of this machine, the faults inflicted on both, and the results of a run without faults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.actor.learner import Learner
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows
from pipeline.config import RunConfig
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import load_records
from pipeline.stages import make_plan
from pipeline.store.storage import RunStore
from tests.faults.processes import descendants, kill

ROOT = Path(__file__).resolve().parents[2]

log = logging.getLogger(__name__)


@dataclass
class Night:
    """A command on a cluster that lives in this process, and the faults inflicted on both."""

    cluster: Cluster
    nodes: list[Any]
    command: list[str]
    output: Path
    pause_s: float = 1.0
    """Longest time from a sign of progress to the next kill, s."""
    seed: int = field(default_factory=lambda: random.randrange(2**32))
    driver: subprocess.Popen[str] | None = None
    kills: int = 0
    """Number of workers killed."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        log.warning("this night's seed: %d", self.seed)

    def start(self) -> None:
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address, "OMP_NUM_THREADS": "1"}
        self.driver = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self) -> str:
        """Wait for the command to succeed and return its output."""
        assert self.driver is not None
        said, _ = self.driver.communicate(timeout=400)
        assert self.driver.returncode == 0, said[-5000:]
        return said

    def await_change(self, seen: Callable[[], object]) -> None:
        """Wait until `seen` returns another value, then for a random time of at most `pause_s`."""
        before, until = seen(), time.monotonic() + 240
        while seen() == before:
            assert self.driver is not None
            assert self.driver.poll() is None, self.driver.communicate()[0][-5000:]
            assert time.monotonic() < until, "nothing comes of it any more"
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, self.pause_s))

    def kill_oldest(self, title: str) -> None:
        """Kill the oldest worker with this title, as soon as there is one. Repeated calls reach the workers in turn,
        because killed workers are started again."""
        assert self.driver is not None
        while not (found := descendants(title)):
            assert self.driver.poll() is None, "it ended before all was done to it"
            time.sleep(0.05)
        kill(min(found))
        self.kills += 1

    def kill_driver(self) -> None:
        assert self.driver is not None
        kill(self.driver.pid)
        self.driver.communicate()

    def replace_node(self) -> None:
        """Remove one node without notice, and add another."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=2))


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """Start a cluster with a head that takes no work and two nodes; deaths of nodes are noticed within seconds."""
    if ray.is_initialized():
        pytest.skip("this process is part of another cluster; run this file in a pytest of its own")
    soon = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, [cluster.add_node(num_cpus=2) for _ in range(2)]
    finally:
        cluster.shutdown()


def learned_calmly(config: RunConfig) -> RunStore:
    """Learn every concept of a manifest in this process, and return the output."""
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


def drawn_calmly(config: RunConfig, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Draw every prompt of every learned concept in this process, and return a row a picture, which all succeeded."""
    records = list(load_records(RunStore(config.output)))
    rows = list(plan_rows(config, records, [Prompt(text) for text in prompts]))
    drawn: list[dict[str, Any]] = Drawer(config)(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    assert {row["status"] for row in drawn} == {"ok"}
    return drawn
