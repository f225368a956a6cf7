"""Actors on the nodes of `test_nodes.py`, which reserve GPUs that do not exist, and the commands that start them.

The workers import this module, which is why it is separate from the tests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray

from pipeline import cluster, run
from pipeline.actor import learner
from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.job import Job
from pipeline.actor.learner import Learner
from pipeline.actor.model_loading import LoadedModel
from pipeline.config import RunConfig
from pipeline.model_actor import ModelActor
from pipeline.store.storage import RunStore
from pipeline.verdict import Policy
from tests.pipeline.fleets import drive_alone
from tests.pipeline.runs import task
from tests.pipeline.stand_ins import StandIn
from textual_inversion.slot_state import SlotState

HELD_FROM_STEP = 100
"""Step beyond which no concept is learned on a slow node."""


class Napper(StandIn):
    """A stand-in whose concepts end when a file `end.<concept>` exists."""

    async def notice(self) -> None:
        while not cluster.is_leaving():
            await asyncio.sleep(0.5)

    async def _behave(self, kind: str, name: str, attempt: int) -> None:  # noqa: ARG002
        node = ray.get_runtime_context().get_node_id()
        (self._notes / f"on.{name}.{attempt}.{node}").touch()
        while not (self._notes / f"end.{name}").exists():
            await asyncio.sleep(0.05)


def nap() -> None:
    """Drive nappers, one to a GPU, and print how each concept ended. Arguments: FOLDER ACTORS NAME..."""
    folder, actors, *names = sys.argv[1:]
    ray.init(logging_level="ERROR", log_to_driver=False)
    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0, num_gpus=1)(Napper)
    policy = Policy(max_actors=int(actors), backoff_s=0.5)
    for record in drive_alone(map(task, names), lambda: actor_class.remote(folder, 1), policy):
        sys.stdout.write(json.dumps([record.concept_id, record.status, record.attempts]) + "\n")


def _note(what: str) -> Path:
    """Create and return a file for this process in the folder of notes."""
    node = ray.get_runtime_context().get_node_id()
    path = Path(os.environ["NODES_NOTES"]) / f"{what}.{node}.{os.getpid()}"
    path.touch()
    return path


class CpuActor(ModelActor):
    """An actor that reserves a GPU and works on the CPU. It notes on which node it loads the model and is to draw,
    counts its calls to draw in that note, and on a node for which a file `slow.<node>` exists it learns slowly
    and not to the end. Its first drawing waits for one on another node, because whichever is ready first may otherwise
    draw everything."""

    def __init__(self, config: RunConfig, on_ready: Callable[[ModelActor], None] | None = None) -> None:
        self._loaded = _note("load")
        super().__init__(dataclasses.replace(config, device="cpu"), on_ready)

    def new_learner(self, config: RunConfig, model: LoadedModel) -> Learner:
        slow = self._loaded.with_name(f"slow.{ray.get_runtime_context().get_node_id()}")
        learner.Checkpoints = partial(SlowCheckpoints, slow=slow)  # type: ignore[assignment,misc]
        return super().new_learner(config, model)

    async def prepare_drawing(self) -> int:
        self._drawn = _note("draw")
        return await super().prepare_drawing()

    async def draw(self, batch: pa.Table) -> pa.Table:
        with self._drawn.open("a") as calls:
            calls.write("x")
        while sum(path.stat().st_size > 0 for path in self._drawn.parent.glob("draw.*")) < 2:
            await asyncio.sleep(0.1)
        return await super().draw(batch)


class SlowCheckpoints(Checkpoints):
    """Checkpoints that keep the engine waiting while a file exists, and from `HELD_FROM_STEP` on hold it."""

    def __init__(self, store: RunStore, slow: Path) -> None:
        super().__init__(store)
        self._slow = slow

    def save(self, job: Job, state: SlotState, *, is_last: bool) -> None:
        super().save(job, state, is_last=is_last)
        if self._slow.exists():
            time.sleep(1)
        while self._slow.exists() and state.step >= HELD_FROM_STEP:
            time.sleep(0.1)


def run_command() -> None:
    """Run `python -m pipeline.run` with these actors."""
    cluster.ModelActor = CpuActor  # type: ignore[misc]
    sys.exit(run.main())
