"""Load the model once, hand concepts to the engine, publish what it learned.

No Ray in here: the driver makes `Learner` an actor class, and tests call it as it is. Its threads: the event loop only
awaits, small pools fetch, encode and store, one thread draws, and one runs the engine's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from PIL import Image

from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.failures import ConceptFailure, broken_by, failure_of
from pipeline.actor.image_batcher import ImageBatcher
from pipeline.actor.job import Job, Pictures
from pipeline.actor.loaded_settings import LoadedSettings
from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import Learned, failure_record, put_done, put_files
from pipeline.actor.samples import Samples, sample_requests, score
from pipeline.actor.tuning import compile_where_wanted, default_slots, passes_to_learn
from pipeline.actor.vitals import Vitals, held_bytes
from pipeline.actor.warm_start import load_examples
from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from pipeline.inputs.photos import open_pictures
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, from_json
from pipeline.store.errors import (
    ActorBroken,
    ActorLeaving,
    InputChanged,
    PhotosUnreachable,
    describe_error,
    is_client_error,
)
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.errors import BUG
from textual_inversion.extractors import ClipExtractor
from textual_inversion.latents import encode_views
from textual_inversion.prompts import check_sample_prompts
from textual_inversion.start_choice import StartChooser

log = logging.getLogger(__name__)

POOL_THREADS, _ROOM_TRIES = 4, 5

T = TypeVar("T")


class Learner:
    """Learns concepts, several at a time, with one frozen model on one device."""

    def __init__(self, config: RunConfig, equip: Callable[[Learner], None] | None = None) -> None:
        """`equip`: called with it at the end, in its own process."""
        self._config = config
        self._store = RunStore(config.output)
        self._loaded_settings = LoadedSettings(config)
        self._backbone = load_model(config)
        self._extractor = ClipExtractor(locate(config.extractor), config.device) if config.extractor else None
        init = config.inversion.init
        examples = (
            load_examples(init.earlier_run, self._backbone.model_hash(), config.photos) if init.earlier_run else ()
        )
        self._choose_start = StartChooser(self._backbone, init, self._extractor, seed=config.seed, examples=examples)
        self._features = self._extractor.pixel_features if self._extractor else None
        self._slots = config.actors.slots or default_slots(self._backbone, config.inversion, self._features)
        self._loaded_settings.check_unchanged()
        self._compile()
        self._image_batcher = ImageBatcher(self._backbone, config.grid.sampling)
        self._room = asyncio.Semaphore(self.ready())
        """Bounds the photos and latents held in memory."""
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="learner")
        self._saver = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="saver")  # no checkpoint waits for pictures
        self._assignments: queue.Queue[Assignment | None] = queue.Queue()
        self._jobs: dict[str, Job] = {}
        """Concept id -> job, from the start of `learn` to its end."""
        self._engine: Engine | None = None
        self._crowding: set[str] | None = None
        """Concepts in slots whose state is awaited before there are fewer slots; None while there is enough memory."""
        self._draining = self._leaving = False
        self._closed = threading.Event()
        self._broken: ActorBroken | None = None
        """Reason why the engine has ended; None while it runs."""
        threading.Thread(target=self._run_engine, name="engine", daemon=True).start()
        if equip is not None:
            equip(self)

    def ready(self) -> int:
        """How many concepts it takes at a time: its slots, and a few whose photos are prepared meanwhile."""
        return self._slots + self._config.actors.calls_ahead

    async def learn(self, task: ConceptTask, attempt: int = 1) -> ConceptRecord:
        """Learn one concept and publish it. Return the record; the caller stores it if it is of a failed concept.

        Raises ActorBroken when the actor must be replaced, ActorLeaving when its node is taken back before this begins,
        StoreFailed when the run's storage fails, and PhotosUnreachable when its photos cannot be had for now.
        """
        async with self._room:
            job = self._jobs[task.concept.concept_id] = Job(task, ConceptLog(self._store, task.folder, attempt))
            try:
                return await self._learn(job, attempt)
            except Exception as error:
                return await self._failed(job, attempt, error)
            finally:
                del self._jobs[task.concept.concept_id]

    async def _failed(self, job: Job, attempt: int, error: Exception) -> ConceptRecord:
        """Return the record of a concept that the error ends; raise what the driver is to decide about instead."""
        try:
            failure = failure_of(error, self._store.uri(job.task.folder.log))
        except ActorBroken as broken:
            await self._in_pool(partial(job.log.store, "lost with its actor", error=str(broken)))
            raise
        except ActorLeaving:
            await self._in_pool(partial(job.log.store, "handed back, as its node is taken back"))
            raise
        except InputChanged as changed:
            await self._in_pool(partial(job.log.store, "to be planned anew", reason=str(changed)))
            raise
        return await self._end(job, attempt, failure)

    async def _end(self, job: Job, attempt: int, failure: ConceptFailure) -> ConceptRecord:
        """Write the failure to the concept's log and return its record."""
        trace = {"trace": failure.trace} if failure.trace else {}
        if failure.kind == BUG:
            log.error("concept %s: %s\n%s", job.task.concept.concept_id, failure.text, failure.trace)
        tell = partial(job.log.store, "failed", error=failure.text, kind=failure.kind, **trace)
        await self._in_pool(tell)
        return failure_record(job.task, failure.text, attempt, failure.kind)

    def vitals(self) -> Vitals:
        """May be asked on any thread."""
        device_bytes, host_bytes = held_bytes(self._backbone.device)
        return Vitals(
            steps=self._engine.steps_taken if self._engine else 0,
            slots=self._slots,
            slots_used=sum(job.in_slot for job in list(self._jobs.values())),
            losses=self._engine.losses() if self._engine else [],
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )

    def leave(self) -> None:
        """Its node is taken back: begin nothing more, hand back what has not begun, and save what is in slots after the
        step that is going on. To be called every few seconds until the end, on any thread."""
        self._leaving = True
        if self._engine is not None:
            self._engine.save_soon()

    async def notice(self) -> None:
        """Return when its node is to be taken back."""
        while not self._leaving:
            await asyncio.sleep(0.5)

    async def drain(self, seconds: float) -> None:
        """Start no more concepts; return when each one in a slot has written a checkpoint or its record, or time is
        up. Without checkpoints (`actors.checkpoint_steps` 0) there is nothing to wait for but records."""
        self._draining = True
        deadline = time.monotonic() + seconds
        before = {job: job.num_saves for job in self._jobs.values()}
        saves = self._config.actors.checkpoint_steps > 0
        if self._engine is not None:
            self._engine.save_soon()
        while time.monotonic() < deadline and not self._broken:
            jobs = list(self._jobs.values())
            unsaved = saves and any(job.in_slot and job.num_saves == before.get(job, 0) for job in jobs)
            if not unsaved and not any(job.outcome.done() for job in jobs):
                return
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Let the engine end once its slots are empty."""
        self._closed.set()
        self._assignments.put(None)
        self._pool.shutdown()
        self._image_batcher.close()
        self._saver.shutdown()

    async def _learn(self, job: Job, attempt: int) -> ConceptRecord:
        task = job.task
        if self._leaving:
            raise ActorLeaving
        self._loaded_settings.check(task, self._store)
        if attempt > 1 and await self._in_pool(lambda: self._store.exists(task.folder.record)):
            # an earlier attempt had finished; only its answer was lost
            return from_json(await self._in_pool(lambda: self._store.get(task.folder.record)))
        pictures = await self._in_pool(lambda: self._fetch(task))
        job.log.note("photos fetched", photos=len(pictures.photos))
        job.assignment = await self._on_device(lambda: self._in_pool(lambda: self._encode(job, pictures)))
        self._assignments.put(job.assignment)
        if self._broken:  # looked at after the job is known: the engine's end cannot have missed it
            raise self._broken
        outcome = await asyncio.wrap_future(job.outcome)
        job.log.note("left the engine", step=outcome.steps, seconds=round(outcome.seconds, 3))
        if outcome.embedding is None:
            failure = ConceptFailure(outcome.kind or BUG, outcome.error or "the engine gave no reason")
            return await self._end(job, attempt, failure)
        return await self._publish(job, pictures.photos, outcome, attempt)

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _on_device(self, work: Callable[[], Awaitable[T]]) -> T:
        """When the device has no memory left for it, again when the engine has given some back."""
        for _ in range(_ROOM_TRIES):
            slots = self._slots
            try:
                return await work()
            except torch.OutOfMemoryError as error:
                log.warning("no memory beside %d slots: %s", slots, describe_error(error))
            if self._slots == slots:  # else somebody else's want of memory has been seen to meanwhile
                self._crowding = {name for name, job in self._jobs.items() if job.in_slot}
                if self._engine is not None and slots > 1:
                    self._engine.save_soon()
            while self._slots == slots and not self._broken and any(job.in_slot for job in self._jobs.values()):
                await asyncio.sleep(0.05)
            torch.cuda.empty_cache()
        return await work()

    def _compile(self) -> None:
        """As `actors.compile` says, for the passes that so many slots make."""
        passes = passes_to_learn(self._backbone, self._config, self._slots)
        compile_where_wanted(self._backbone, self._config, passes)

    def _fetch(self, task: ConceptTask) -> Pictures:
        """Fetch the photos and masks that the task's fingerprint was made from. Raises InputChanged for others."""
        try:
            return Pictures(*open_pictures(task.concept, self._config.photos, task.inputs))
        except OSError as error:
            raise PhotosUnreachable(str(error)) from error

    def _encode(self, job: Job, pictures: Pictures) -> Assignment:
        """Encode the photos once, see where to start, and take up the checkpoint that an earlier attempt may have left:
        with one, the rows are as it says, and the start only has its initializer."""
        config, folder = self._config, job.task.folder
        job.start = self._choose_start(job.task.concept, pictures.photos)
        concept = job.start.concept
        check_sample_prompts(self._backbone.vocabularies, concept, config.grid.prompts_for(concept.category))
        views = encode_views(
            self._backbone, pictures.photos, config.inversion.augment, concept.concept_id, config.seed, pictures.masks
        )
        state = None
        try:
            data = self._store.get(folder.checkpoint)
            job.was_saved = True
            state = SlotState.from_bytes(data)
        except FileNotFoundError:
            pass
        except ValueError as error:
            log.warning("concept %s starts anew: %s", concept.concept_id, error)
            job.log.note(f"starts anew: {error}")
        job.log.note("prepared", start=job.start.reason, step=state.step if state else 0)
        return Assignment(concept, views, state, job.start.embedding)

    def _run_engine(self) -> None:
        """An engine, and with fewer slots another whenever the device is out of memory."""
        as_begun = self._slots
        while not self._broken:
            error = self._run_until_crowded(compile_anew=self._slots != as_begun)
            if error and self._slots == 1:
                self._broken = ActorBroken(f"the device has no memory for one slot: {error}")
            elif error:
                self._give_up_slots(error)
        for job in list(self._jobs.values()):
            if not job.outcome.done():
                job.outcome.set_exception(self._broken or ActorBroken("the engine ended"))

    def _run_until_crowded(self, compile_anew: bool) -> str:
        """What the device says when it has no memory left; empty when the engine is no more for other reasons."""
        config = self._config
        try:
            if compile_anew:
                self._compile()
            self._engine = Engine(
                self._backbone, config.inversion, slots=self._slots, seed=config.seed, image_features=self._features
            )
            self._engine.run(self._next_assignment, self._ended, self._checkpoint, config.actors.checkpoint_steps)
            self._broken = ActorBroken("the engine was closed")
        except torch.OutOfMemoryError as error:
            return describe_error(error)
        except BaseException as error:
            log.exception("the engine stopped")
            self._broken = broken_by(error)
        return ""

    def _give_up_slots(self, error: str) -> None:
        """Half of them; what was in a slot goes on from its last checkpoint, in memory, before all that waits."""
        self._engine, self._crowding = None, None
        torch.cuda.empty_cache()
        log.warning("%d slots instead of %d from now on: %s", self._slots // 2, self._slots, error)
        in_slots = [job for job in list(self._jobs.values()) if job.in_slot]
        waiting = [job.assignment for job in in_slots]
        for job in in_slots:
            job.in_slot = False
        while not self._assignments.empty():
            waiting.append(self._assignments.get())
        for assignment in waiting:
            self._assignments.put(assignment)
        self._slots //= 2

    def _next_assignment(self, wait: bool) -> Assignment | None:
        """Asked by the engine on its own thread; None while it waits ends it."""
        while not self._draining:
            try:
                assignment = self._assignments.get(block=wait)
            except queue.Empty:
                return None
            if assignment is None:
                self._assignments.put(None)  # it will ask again, with `wait`, when its slots are empty
                return None
            job = self._jobs[assignment.concept.concept_id]
            if not self._leaving:
                job.in_slot = True
                return assignment
            job.outcome.set_exception(ActorLeaving())
        if wait:
            self._closed.wait()  # its process is about to end
        return None

    def _ended(self, outcome: Outcome) -> None:
        job = self._jobs[outcome.concept.concept_id]
        job.in_slot = False
        job.outcome.set_result(outcome)
        self._left_slot(outcome.concept)

    def _left_slot(self, concept: Concept) -> None:
        """Or its state is known: when none is missing any more, there can be fewer slots."""
        if self._crowding is not None and self._slots > 1:
            self._crowding.discard(concept.concept_id)
            if not self._crowding:
                raise torch.OutOfMemoryError("photos or sample pictures found no memory")

    def _checkpoint(self, concept: Concept, state: SlotState) -> None:
        """Handed to a pool, so that the engine never waits for storage; left out while the last is on its way."""
        job = self._jobs[concept.concept_id]
        assert job.assignment is not None
        job.assignment = replace(job.assignment, state=state)
        if self._config.actors.checkpoint_steps and (job.save is None or job.save.done() or self._draining):
            job.save = self._saver.submit(self._save, job, state, job.save)
        self._left_slot(concept)
        if self._leaving:
            self._next_assignment(wait=False)  # hands back what waits for a slot

    def _save(self, job: Job, state: SlotState, former: concurrent.futures.Future[None] | None) -> None:
        if former is not None:
            former.result()  # else it could land after this one
        job.was_saved = True
        try:
            self._store.put(job.task.folder.checkpoint, state.to_bytes())
            job.num_saves += 1
            tell = job.log.store if job.num_saves == 1 or self._draining else job.log.note  # the first: it was here
            tell("checkpoint", step=state.step)
        except Exception as error:
            if not (isinstance(error, OSError) or is_client_error(error)):
                raise
            # the concept goes on; only a crash before the next checkpoint would cost more steps
            log.warning("a checkpoint of %s was not stored: %s", job.task.concept.concept_id, error)

    async def _publish(self, job: Job, photos: list[Image.Image], outcome: Outcome, attempt: int) -> ConceptRecord:
        """Its pictures, which share batches with those of other concepts, and then all that is to be stored of it."""
        assert outcome.embedding is not None
        assert job.start is not None
        concept, grid = job.start.concept, self._config.grid
        requests = sample_requests(
            concept, outcome.embedding, grid, self._config.seed, initial=self._extractor is not None
        )
        pictures = await self._on_device(lambda: asyncio.wrap_future(self._image_batcher.draw(requests)))
        samples = Samples.of(pictures, concept.category, grid)
        return await self._on_device(lambda: self._in_pool(lambda: self._put(job, photos, outcome, samples, attempt)))

    def _put(
        self, job: Job, photos: list[Image.Image], outcome: Outcome, samples: Samples, attempt: int
    ) -> ConceptRecord:
        """Everything the concept produced, then its record."""
        assert job.start is not None
        learned = Learned(
            task=replace(job.task, concept=job.start.concept), start=job.start.reason, outcome=outcome, attempt=attempt,
            scores=score(self._extractor, photos, samples) if self._extractor else {}, grid=samples.sheet(photos),
        )  # fmt: skip
        files = put_files(self._store, learned, self._config.model, self._backbone.model_hash())
        if job.save is not None:
            job.save.result()  # else it could land after the checkpoint is deleted; raises if saving has a bug
        if job.was_saved:
            self._store.delete(job.task.folder.checkpoint)
        job.log.store("published", steps=outcome.steps, seconds=round(outcome.seconds, 1), scores=learned.scores)
        return put_done(self._store, learned, files, self._config.gate)
