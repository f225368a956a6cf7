"""What runs on the nodes of `test_nodes.py`: actors that take a GPU that is not there, and what starts them.

A module of its own, as the workers import it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import ray

from pipeline import cluster, run
from pipeline.actors import Learner
from pipeline.config import RunConfig
from pipeline.driver import Policy, drive
from tests.pipeline.runs import task
from tests.pipeline.stand_ins import StandIn


class Napper(StandIn):
    """Its concepts end when they are told to: when a file `end.<concept>` is there."""

    async def _behave(self, name: str, attempt: int) -> None:
        node = ray.get_runtime_context().get_node_id()
        (self._notes / f"on.{name}.{attempt}.{node}").touch()
        while not (self._notes / f"end.{name}").exists():
            await asyncio.sleep(0.05)


def nap() -> None:
    """FOLDER ACTORS NAME...: drive nappers, one to a GPU, and say what became of each concept."""
    folder, actors, *names = sys.argv[1:]
    ray.init(logging_level="ERROR", log_to_driver=False)
    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0, num_gpus=1)(Napper)
    policy = Policy(max_actors=int(actors), backoff_s=0.5)
    for record in drive(map(task, names), lambda: actor_class.remote(folder, 1), policy):
        sys.stdout.write(json.dumps([record.concept_id, record.status, record.attempts]) + "\n")


class CpuLearner(Learner):
    """Reserves a GPU, as its cluster has some, and works on the CPU. Notes that it loads the model, and where."""

    def __init__(self, config: RunConfig, equip: Callable[[Learner], None] | None = None) -> None:
        node = ray.get_runtime_context().get_node_id()
        (Path(os.environ["NODES_NOTES"]) / f"load.{node}.{os.getpid()}").touch()
        super().__init__(dataclasses.replace(config, device="cpu"), equip)


def run_command() -> None:
    """`python -m pipeline.run` with this actor."""
    cluster.Learner = CpuLearner  # type: ignore[misc]
    sys.exit(run.main())
