"""The command, and the training of an encoder, with an engine that waits at a checkpoint until a test has done what it
wants done in the middle of the work.

Without the wait a fast machine would be at the end before the test has looked. The workers import this module, which is
why it is separate from the tests.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import cluster, run
from pipeline.actor import learner
from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.job import Job
from pipeline.actor.learner import Learner
from pipeline.actor.model_loading import LoadedModel
from pipeline.config import RunConfig
from pipeline.ledger.encoder_record import CHECKPOINT
from pipeline.model_actor import ModelActor
from pipeline.store.storage import RunStore
from textual_inversion.slot_state import SlotState

LEARNER = "ray::HeldActor"
"""How Ray names the process of a held actor."""


def hold_of(output: Path | str) -> Path:
    """Return the file that holds the engine while it exists; of a run, from the rung on that the file names."""
    return Path(f"{output}-hold")


class HeldActor(ModelActor):
    """An actor whose engine waits behind each checkpoint while it is held. A drain ends that."""

    def new_learner(self, config: RunConfig, model: LoadedModel) -> Learner:
        learner.Checkpoints = partial(HeldCheckpoints, hold=hold_of(config.output))  # type: ignore[assignment,misc]
        return super().new_learner(config, model)

    async def drain(self, seconds: float) -> None:
        saved = asyncio.create_task(super().drain(seconds))
        await asyncio.sleep(0)  # now the engine knows that it is to save
        hold_of(self._config.output).unlink(missing_ok=True)
        await saved


class HeldCheckpoints(Checkpoints):
    """Checkpoints that keep the engine waiting while a file exists."""

    def __init__(self, store: RunStore, hold: Path) -> None:
        super().__init__(store)
        self._hold = hold

    def save(self, job: Job, state: SlotState, *, is_last: bool) -> None:
        super().save(job, state, is_last=is_last)
        while self._is_held(job.task.rung):
            time.sleep(0.02)

    def _is_held(self, rung: int) -> bool:
        try:
            return rung >= int(self._hold.read_text())
        except FileNotFoundError:
            return False


def train_held(settings: Mapping[str, Any]) -> None:
    """Train an encoder as a worker does; wait behind each checkpoint while the training is held."""
    from pipeline.encoder_training import workers

    hold, put = hold_of(settings["job"].config.output), RunStore.put

    def put_and_wait(store: RunStore, path: str, data: bytes) -> None:
        put(store, path, data)
        while path == CHECKPOINT and hold.exists():
            time.sleep(0.02)

    RunStore.put = put_and_wait  # type: ignore[method-assign]
    workers._train(settings)


def main() -> None:
    """Run `python -m pipeline.run` with these actors."""
    cluster.ModelActor = HeldActor  # type: ignore[misc]
    sys.exit(run.main())


def train() -> None:
    """Run `python -m pipeline.train_encoder` with these workers."""
    from pipeline import train_encoder
    from pipeline.encoder_training import workers

    workers._train = train_held
    sys.exit(train_encoder.main())
