"""The actor of a run: one loaded model, which learns by one set of settings after the other, and draws.

This module does not import Ray: the driver makes `ModelActor` an actor class, and tests call it as it is.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import torch

from pipeline.actor.learner import Learner
from pipeline.actor.model_loading import LoadedModel
from pipeline.actor.vitals import Vitals, held_bytes
from pipeline.bulk.drawer import Drawer
from pipeline.config import RunConfig
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.concept_progress import ConceptProgress
from pipeline.store.errors import ActorBroken


class ModelActor:
    """An actor (`interface.LearnerActor`) that holds the run's model for as long as it lives."""

    def __init__(self, config: RunConfig, on_ready: Callable[[ModelActor], None] | None = None) -> None:
        """Load the model. `on_ready` is called with the actor at the end, in its own process.

        Raises ValueError for a model that cannot be used.
        """
        self._config = config
        self._model = LoadedModel(config)
        self._learner: Learner | None = None
        self._drawer: Drawer | None = None
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="drawer")
        """The thread that draws: CUDA graphs belong to the thread that recorded them."""
        self._steps_before = 0
        """Steps of the learners before the present one."""
        self._is_leaving = False
        if on_ready is not None:
            on_ready(self)

    def prepare(self, config: RunConfig) -> int:
        """Make a learner with these settings in place of any former one, and return how many concepts it takes at a
        time. The settings name the model that this actor has loaded; the device is the actor's.

        Raises ValueError for settings or files that cannot be used.
        """
        self._drawer = None
        self._end_learner()
        self._learner = self.new_learner(replace(config, device=self._config.device), self._model)
        if self._is_leaving:
            self._learner.leave()
        return self._learner.ready()

    def new_learner(self, config: RunConfig, model: LoadedModel) -> Learner:
        """Return a learner of the kind that this actor has."""
        return Learner(config, model)

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        """Learn one concept and publish it, see `Learner.learn`."""
        if self._learner is None:
            raise ActorBroken("the actor was not told by what settings to learn")
        return await self._learner.learn(task, attempt)

    async def prepare_drawing(self) -> int:
        """End learning, whose memory drawing may need, and get ready to draw. Return 1, the calls of `draw` that it
        works on at a time."""
        self._end_learner()
        loop = asyncio.get_running_loop()
        self._drawer = await loop.run_in_executor(self._drawing, Drawer, self._config, self._model)
        return 1

    async def draw(self, batch: pa.Table) -> pa.Table:
        """Draw plan rows and store the pictures, see `Drawer`."""
        if self._drawer is None:
            raise ActorBroken("the actor was not told to draw")
        return await asyncio.get_running_loop().run_in_executor(self._drawing, self._drawer, batch)

    def progress(self) -> list[ConceptProgress]:
        """Return how far each of its concepts is."""
        learner = self._learner
        return learner.progress() if learner else []

    async def drain(self, seconds: float) -> None:
        """Start no more concepts; return when each one in a slot is saved, or time is up, see `Learner.drain`."""
        if self._learner is not None:
            await self._learner.drain(seconds)

    async def notice(self) -> None:
        """Return when its node is to be taken back."""
        while not self._is_leaving:
            await asyncio.sleep(0.5)

    def leave(self) -> None:
        """Begin nothing more, as the node is taken back, see `Learner.leave`. To be called every few seconds until the
        end, on any thread."""
        self._is_leaving = True
        if (learner := self._learner) is not None:
            learner.leave()

    def vitals(self) -> Vitals:
        """Return the actor's numbers at this moment. May be called on any thread."""
        learner = self._learner
        if learner is not None:
            now = learner.vitals()
            return replace(now, steps=self._steps_before + now.steps)
        device_bytes, host_bytes = held_bytes(self._model.backbone.device)
        return Vitals(
            steps=self._steps_before, slots=0, slots_used=0, losses=[], device_bytes=device_bytes, host_bytes=host_bytes
        )

    def close(self) -> None:
        """End all threads. For an actor that lives in a caller's process; Ray's ends with its own process."""
        self._end_learner()
        self._drawing.shutdown()

    def _end_learner(self) -> None:
        """Close the learner and give the memory of its engine back to the device."""
        learner, self._learner = self._learner, None
        if learner is None:
            return
        learner.close()
        self._steps_before += learner.vitals().steps
        del learner
        gc.collect()  # a learner and its threads refer to each other
        torch.cuda.empty_cache()
