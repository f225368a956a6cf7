"""Hand concepts to the engine, publish what it learned.

This module does not import Ray: a `ModelActor` calls it, and tests call it as it is. The event loop only awaits; small
pools of threads fetch, encode and store, one thread draws, and one runs the engine's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from PIL import Image

from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.engine_thread import EngineThread
from pipeline.actor.failures import ConceptFailure, failure_of, trace_of
from pipeline.actor.image_batcher import ImageBatcher
from pipeline.actor.job import Job, Pictures, progress_of
from pipeline.actor.loaded_settings import LoadedSettings
from pipeline.actor.model_loading import LoadedModel
from pipeline.actor.previews import Previews
from pipeline.actor.publish import failure_record, put_done, put_files
from pipeline.actor.samples import Samples, initializer_requests, sample_requests, score
from pipeline.actor.shared_pictures import SharedPictures
from pipeline.actor.slot_budget import SlotBudget
from pipeline.actor.tuning import PassSharing, compile_where_wanted, fit_slots, passes_to_learn
from pipeline.actor.vitals import Vitals, held_bytes
from pipeline.actor.warm_start import GivenStarts, load_encoder_extractor, load_examples, read_encoder
from pipeline.config import RunConfig
from pipeline.inputs.models import with_captions
from pipeline.inputs.photos import open_pictures
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, DrawnWith, from_json
from pipeline.report.concept_progress import ConceptProgress
from pipeline.store.errors import (
    ActorBroken,
    ActorLeaving,
    InputChanged,
    PhotosUnreachable,
    describe_error,
)
from pipeline.store.storage import RunStore
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.errors import BUG
from textual_inversion.generate import with_own_defaults
from textual_inversion.latents import encode_views
from textual_inversion.prompts import check_placeholder, check_sample_prompts
from textual_inversion.start_choice import ChosenStart, StartChooser

log = logging.getLogger(__name__)

POOL_THREADS = 4

_MEMORY_TRIES = 5
"""Tries of work on the device beside the engine while it finds no memory."""

T = TypeVar("T")


class Learner:
    """Learn concepts by one set of settings, several at a time, with one frozen model."""

    def __init__(self, config: RunConfig, model: LoadedModel | None = None) -> None:
        """Start the engine. `model` is the run's, which others may use when this learner is closed; None loads it.

        Raises ValueError for settings, models or files that cannot be used.
        """
        model = LoadedModel(config) if model is None else model
        config = with_captions(config)
        self._config = config
        self._store = RunStore(config.output)
        self._backbone, self._extractor = model.backbone, model.extractor
        self._other_photos = model.other_photos
        self._loaded_settings = LoadedSettings(config, model.digests)
        init = config.inversion.init
        model_hash = self._backbone.model_hash()
        is_fitted = init.method == "amortised" and init.earlier_run
        examples = load_examples(init.earlier_run, model_hash, config.photos) if is_fitted else ()
        self._given_start = GivenStarts(config, model_hash)
        encoder = read_encoder(config, self._backbone) if init.method == "encoder" else None
        self._choose_start = StartChooser(
            self._backbone,
            init,
            self._extractor,
            seed=config.seed,
            examples=examples,
            encoder=encoder,
            encoder_extractor=load_encoder_extractor(config, self._extractor) if encoder else None,
        )
        self._features = self._extractor.pixel_features if self._extractor else None
        slots, self._memory = fit_slots(model.estimates, config, self._features)
        self._budget = SlotBudget(slots)
        self._sharing = PassSharing(self._backbone, config, self._features)
        self._jobs: dict[str, Job] = {}
        """Concept id -> job, from the start of `learn` to its end."""
        self._checkpoints = Checkpoints(self._store)
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="learner")
        self._previews = Previews(self._backbone, config, self._store, self._jobs)
        self._engine = EngineThread(
            self._new_engine,
            self._budget,
            self._jobs,
            self._checkpoints,
            config.actors.checkpoint_steps,
            self._previews.draw if config.preview.steps else None,
            config.preview.steps,
        )
        self._image_batcher = ImageBatcher(self._backbone, self._sharing.choose_sampling())
        self._initializer_pictures = SharedPictures(self._image_batcher.draw, self._backbone.resolution)
        self._admission = asyncio.Semaphore(self.ready())
        """Bounds the photos and latents held in memory."""
        self._is_leaving = False
        self._is_closed = False

    def ready(self) -> int:
        """Return how many concepts it takes at a time: its slots, and a few whose photos are prepared meanwhile."""
        return self._budget.slots + self._config.actors.calls_ahead

    async def learn(self, task: ConceptTask, attempt: int = 1) -> ConceptRecord:
        """Learn one concept and publish it. Return the record; the caller stores it if it is of a failed concept.

        Raises what `interface.LearnerActor.learn` names: ActorBroken, ActorLeaving, StoreFailed, PhotosUnreachable,
        InputChanged or RunAborted.
        """
        async with self._admission:
            job = Job(task, attempt, ConceptLog(self._store, task.folder, attempt))
            self._jobs[task.concept.concept_id] = job
            try:
                return await self._learn(job)
            except Exception as error:
                return await self._fail(job, error)
            finally:
                del self._jobs[task.concept.concept_id]

    async def _fail(self, job: Job, error: Exception) -> ConceptRecord:
        """Return the record of a concept that the error ends; raise what the driver is to decide about instead."""
        try:
            failure = failure_of(error, self._store.uri(job.task.folder.log))
        except ActorBroken as broken:
            trace = {"trace": trace_of(broken)} if broken.kind == BUG else {}
            await asyncio.to_thread(partial(job.log.store, "lost with its actor", error=str(broken), **trace))
            raise
        except ActorLeaving:
            await asyncio.to_thread(partial(job.log.store, "handed back, as its node is taken back"))
            raise
        except InputChanged as changed:
            await asyncio.to_thread(partial(job.log.store, "to be planned anew", reason=str(changed)))
            raise
        return await self._end(job, failure)

    async def _end(self, job: Job, failure: ConceptFailure) -> ConceptRecord:
        """Write the failure to the concept's log and return its record."""
        trace = {"trace": failure.trace} if failure.trace else {}
        if failure.kind == BUG:
            log.error("concept %s: %s\n%s", job.task.concept.concept_id, failure.text, failure.trace)
        tell = partial(job.log.store, "failed", error=failure.text, kind=failure.kind, **trace)
        await asyncio.to_thread(tell)
        return failure_record(job.task, failure.text, job.attempt, failure.kind)

    def vitals(self) -> Vitals:
        """Return the actor's numbers at this moment. May be called on any thread."""
        device_bytes, host_bytes = held_bytes(self._backbone.device)
        return Vitals(
            steps=self._engine.steps_taken,
            slots=self._budget.slots,
            slots_used=self._num_in_slots(),
            losses=[each.loss for each in self._engine.progress() if each.loss is not None],
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )

    def progress(self) -> list[ConceptProgress]:
        """Return how far each of its concepts is. May be called on any thread."""
        in_slots = {each.concept_id: each for each in self._engine.progress()}
        return [progress_of(job, in_slots.get(job.task.concept.concept_id)) for job in list(self._jobs.values())]

    def leave(self) -> None:
        """Begin nothing more, as the node is taken back: return concepts that have not begun to the driver, and
        save those in slots after the present step. To be called every few seconds until the end, on any thread."""
        self._is_leaving = True
        self._engine.leave()

    async def drain(self, seconds: float) -> None:
        """Start no more concepts; return when each one in a slot has written a checkpoint or its record, or time is
        up. Without checkpoints (`actors.checkpoint_steps` 0) there is nothing to wait for but records."""
        deadline = time.monotonic() + seconds
        before = {job: job.num_saves for job in self._jobs.values()}
        saves = self._config.actors.checkpoint_steps > 0
        self._engine.drain()
        while time.monotonic() < deadline and not self._engine.broken:
            jobs = list(self._jobs.values())
            unsaved = saves and any(job.in_slot and job.num_saves == before.get(job, 0) for job in jobs)
            if not unsaved and not any(job.outcome.done() for job in jobs):
                return
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """End all threads: the engine's after the present step, the others when their work is done."""
        self._is_closed = True
        self._engine.close()
        self._pool.shutdown()
        self._image_batcher.close()
        self._checkpoints.close()
        self._previews.close()

    async def _learn(self, job: Job) -> ConceptRecord:
        task = job.task
        if self._is_leaving:
            raise ActorLeaving
        self._loaded_settings.check(task, self._store)
        earlier = await self._in_pool(lambda: self._store.list(task.folder.root))
        if job.attempt > 1 and task.folder.record in earlier:  # that attempt had finished; only its answer was lost
            return from_json(await self._in_pool(lambda: self._store.get(task.folder.record)))
        if not earlier:  # one request in place of three: there is no checkpoint, no log and no failure
            job.is_new = True
            job.log.mark_new()
        pictures = await self._in_pool(lambda: self._fetch(task))
        job.log.note("photos fetched", photos=len(pictures.photos))
        job.assignment = await self._with_memory(lambda: self._in_pool(lambda: self._encode(job, pictures)))
        self._engine.submit(job)
        outcome = await asyncio.wrap_future(job.outcome)
        job.log.note("left the engine", step=outcome.steps, seconds=round(outcome.seconds, 3))
        if outcome.embedding is None:
            failure = ConceptFailure(outcome.kind or BUG, outcome.error or "the engine gave no reason")
            return await self._end(job, failure)
        return await self._publish(job, pictures.photos, outcome)

    async def _in_pool(self, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise ActorBroken("the learner was closed")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _with_memory(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work on the device beside the engine; where it finds no memory, again when the engine has given some
        back."""
        for _ in range(_MEMORY_TRIES):
            slots = self._budget.slots
            try:
                return await work()
            except torch.OutOfMemoryError as error:
                log.warning("no memory beside %d slots: %s", slots, describe_error(error))
            if self._num_in_slots() and self._budget.report_shortage(slots):
                self._engine.shrink()
            while self._budget.slots == slots and not self._engine.broken and self._num_in_slots():
                await asyncio.sleep(0.05)
            torch.cuda.empty_cache()
        return await work()

    def _num_in_slots(self) -> int:
        return sum(job.in_slot for job in list(self._jobs.values()))

    def _new_engine(self, slots: int) -> Engine:
        """Make an engine, with its passes compiled as `actors.compile` says.

        Raises ValueError if the settings do not go with the model, or if a model or file was replaced while this actor
        read it.
        """
        config = self._config
        compile_where_wanted(self._backbone, config, passes_to_learn(self._backbone, config, slots))
        slots_per_pass = self._sharing.choose_slots_per_pass(slots)
        if slots_per_pass != slots:
            compile_where_wanted(self._backbone, config, passes_to_learn(self._backbone, config, slots_per_pass))
        engine = Engine(
            self._backbone,
            config.inversion,
            slots=slots,
            seed=config.seed,
            slots_per_pass=slots_per_pass,
            image_features=self._features,
        )
        self._loaded_settings.check_unchanged()
        return engine

    def _fetch(self, task: ConceptTask) -> Pictures:
        """Fetch the photos and masks that the task's fingerprint was made from. Raises InputChanged for others."""
        try:
            return Pictures(*open_pictures(task.concept, self._config.photos, task.inputs))
        except OSError as error:
            raise PhotosUnreachable(str(error)) from error

    def _read_start(self, task: ConceptTask) -> ChosenStart | None:
        """Return the start that the concept's row or the earlier run gives; None leaves it to `init.method`."""
        try:
            return self._given_start(task)
        except OSError as error:
            raise PhotosUnreachable(str(error)) from error

    def _encode(self, job: Job, pictures: Pictures) -> Assignment:
        """Choose the start, encode the photos, and load the checkpoint that an earlier attempt may have left. With one,
        the rows are those of the checkpoint, and the start only gives the initializer."""
        config = self._config
        check_placeholder(job.task.concept, self._backbone.vocabularies)
        job.start = self._read_start(job.task) or self._choose_start(job.task.concept, pictures.photos)
        concept = job.start.concept
        check_sample_prompts(
            self._backbone.vocabularies,
            concept,
            config.grid.prompts_for(concept.category),
            class_cue=config.inversion.class_cue,
        )
        views = encode_views(
            self._backbone, pictures.photos, config.inversion.augment, concept.concept_id, config.seed, pictures.masks
        )
        state = self._checkpoints.load(job)
        step = state.step if state else 0
        self._previews.resume(job, step)
        job.log.note("prepared", start=job.start.reason, step=step, memory=self._memory.description)
        return Assignment(concept, views, state, job.start.embedding, job.start.steps)

    async def _publish(self, job: Job, photos: list[Image.Image], outcome: Outcome) -> ConceptRecord:
        """Draw the sample pictures, in batches shared with other concepts, and store what is kept of the concept."""
        assert outcome.embedding is not None
        assert job.start is not None
        concept = job.start.concept
        grid = self._config.grid
        learned = sample_requests(concept, outcome.embedding, grid, self._config.seed, initial=False)
        initial = initializer_requests(concept, grid, self._config.seed) if self._extractor else []

        def draw() -> Awaitable[list[list[Image.Image]]]:
            orders = (self._image_batcher.draw(learned), self._initializer_pictures.of(initial))
            return asyncio.gather(*map(asyncio.wrap_future, orders))

        pictures = [picture for drawn in await self._with_memory(draw) for picture in drawn]
        samples = Samples.from_pictures(pictures, concept.category, grid, outcome.embedding)
        return await self._with_memory(lambda: self._in_pool(lambda: self._put(job, photos, outcome, samples)))

    def _put(self, job: Job, photos: list[Image.Image], outcome: Outcome, samples: Samples) -> ConceptRecord:
        """Score the samples and store everything that the concept produced, its record last."""
        nearest_other = partial(self._other_photos.nearest, job.task.concept) if self._other_photos else None
        scores = score(self._extractor, photos, samples, nearest_other) if self._extractor else {}
        sheet = samples.sheet(photos)
        files = put_files(self._store, job, outcome, sheet, self._config.model, self._backbone.model_hash())
        strip = self._previews.finish(job, outcome)
        self._checkpoints.delete(job)
        job.log.store("published", steps=outcome.steps, seconds=round(outcome.seconds, 1), scores=scores)
        drawn = with_own_defaults(self._config.grid.sampling, self._backbone)
        sampling = DrawnWith(solver=drawn.solver, steps=drawn.steps, guidance_scale=drawn.guidance_scale)
        facts = {"equality": self._sharing.equality, "memory": self._memory.description, "sampling": sampling}
        return put_done(self._store, job, outcome, scores, files, self._config.gate, previews=strip, **facts)
