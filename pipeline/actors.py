"""Load the model once, hand concepts to the engine, publish what it learned.

No Ray in here: the driver makes `Learner` an actor class, and tests call it as it is. Its threads: the event loop only
awaits, a small pool fetches, encodes, draws and stores, and one thread runs the engine's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import io
import logging
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from pipeline.concept_log import ConceptLog
from pipeline.config import RunConfig
from pipeline.earlier import read_examples
from pipeline.faults import ActorBroken
from pipeline.fetch import open_pictures
from pipeline.gate import BELOW, verdict
from pipeline.models import load_model, locate
from pipeline.plan import ConceptTask
from pipeline.records import ConceptRecord, StoredFile, from_json, now, put_record
from pipeline.redact import redact
from pipeline.samples import draw_samples, score
from pipeline.storage import RunStore
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import Concept
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.formats import dump_diffusers
from textual_inversion.initialise import Start, StartChooser
from textual_inversion.latents import encode_views
from textual_inversion.prompts import check_sample_prompts

log = logging.getLogger(__name__)

POOL_THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Pictures:
    """What a concept is learned from, opened."""

    photos: list[Image.Image]
    masks: list[Image.Image]
    """None, or one a photo and of its size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """How an actor does, for whoever watches it."""

    steps: int
    """Optimizer steps since it started, of all its concepts."""
    slots: int
    slots_used: int
    losses: list[float]
    """The last loss read of each concept in a slot."""
    device_bytes: int
    """That torch holds of its GPU's memory; 0 on a CPU."""
    host_bytes: int
    """The most main memory it has held."""


@dataclass(eq=False, slots=True)
class _Job:
    """One concept on its way through the actor."""

    task: ConceptTask
    log: ConceptLog
    start: Start | None = None
    """Chosen when its photos are there."""
    outcome: concurrent.futures.Future[Outcome] = field(default_factory=concurrent.futures.Future)
    save: concurrent.futures.Future[None] | None = None
    """Its last checkpoint on the way to storage."""
    in_slot: bool = False
    num_saves: int = 0


def default_slots(backbone: Backbone, batch_size: int) -> int:
    """Concepts learned side by side when the configuration leaves it open.

    On a CPU one: passes are not shared there, so more would only make each concept take longer. On a GPU what free
    memory holds, at some 1 MB of activations per latent pixel and sample (Stable Diffusion 1.5 in bfloat16).
    """
    if backbone.device.type != "cuda":
        return 1
    free_bytes, _ = torch.cuda.mem_get_info(backbone.device)
    _, height, width = backbone.latent_shape
    return int(min(16, max(1, 0.7 * free_bytes // (1e6 * height * width * batch_size))))


class Learner:
    """Learns concepts, several at a time, with one frozen model on one device."""

    def __init__(self, config: RunConfig, equip: Callable[[Learner], None] | None = None) -> None:
        """`equip`: called with it at the end, in its own process."""
        self._config = config
        self._store = RunStore(config.output)
        self._backbone = load_model(config)
        self._extractor = ClipExtractor(locate(config.extractor), config.device) if config.extractor else None
        init = config.inversion.init
        examples = (
            read_examples(init.earlier_run, self._backbone.model_hash(), config.photos) if init.earlier_run else ()
        )
        self._choose_start = StartChooser(self._backbone, init, self._extractor, seed=config.seed, examples=examples)
        self._slots = config.actors.slots or default_slots(self._backbone, config.inversion.batch_size)
        self._room = asyncio.Semaphore(self.ready())
        """Bounds the photos and latents held in memory."""
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="learner")
        self._assignments: queue.Queue[Assignment | None] = queue.Queue()
        self._jobs: dict[str, _Job] = {}
        """Concept id -> job, from the start of `learn` to its end."""
        self._engine: Engine | None = None
        self._draining = False
        self._broken = ""
        """Why the engine is no more; empty while it runs."""
        threading.Thread(target=self._run_engine, name="engine", daemon=True).start()
        if equip is not None:
            equip(self)

    def ready(self) -> int:
        """How many concepts it takes at a time: its slots, and a few whose photos are prepared meanwhile."""
        return self._slots + self._config.actors.calls_ahead

    async def learn(self, task: ConceptTask, attempt: int = 1) -> ConceptRecord:
        """Learn one concept and publish it. Bad input comes back as a failed record, which is for the caller to store.

        Raises ActorBroken when the actor must be replaced, and OSError when storage fails.
        """
        async with self._room:
            job = self._jobs[task.concept.concept_id] = _Job(task, ConceptLog(self._store, task.folder, attempt))
            try:
                return await self._learn(job, attempt)
            except ValueError as error:
                await self._in_pool(partial(job.log.store, "failed", error=str(error)))
                return failure_record(task, str(error), attempt)
            except ActorBroken as error:
                await self._in_pool(partial(job.log.store, "lost with its actor", error=str(error)))
                raise
            except RuntimeError as error:  # how torch reports a device that is out of memory or lost
                raise ActorBroken(f"{type(error).__name__}: {error}") from error
            finally:
                del self._jobs[task.concept.concept_id]

    def vitals(self) -> Vitals:
        """May be asked on any thread."""
        on_gpu = self._backbone.device.type == "cuda"
        kilobyte = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
        return Vitals(
            steps=self._engine.steps_taken if self._engine else 0,
            slots=self._slots,
            slots_used=sum(job.in_slot for job in list(self._jobs.values())),
            losses=self._engine.losses() if self._engine else [],
            device_bytes=torch.cuda.memory_reserved(self._backbone.device) if on_gpu else 0,
            host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte,
        )

    async def drain(self, seconds: float) -> None:
        """Start no more concepts; return when each one in a slot has written a checkpoint or its record, or time is
        up. Without checkpoints (`actors.checkpoint_steps` 0) there is nothing to wait for but records."""
        self._draining = True
        deadline = time.monotonic() + seconds
        before = {job: job.num_saves for job in self._jobs.values()}
        while time.monotonic() < deadline and not self._broken:
            waiting = (job for job in self._jobs.values() if job.in_slot or job.outcome.done())
            if not any(job.num_saves == before.get(job, 0) or job.outcome.done() for job in waiting):
                return
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Let the engine end once its slots are empty."""
        self._assignments.put(None)
        self._pool.shutdown()

    async def _learn(self, job: _Job, attempt: int) -> ConceptRecord:
        task = job.task
        if attempt > 1 and await self._in_pool(lambda: self._store.exists(task.folder.record)):
            # an earlier attempt had finished; only its answer was lost
            return from_json(await self._in_pool(lambda: self._store.get(task.folder.record)))
        pictures = await self._in_pool(lambda: self._fetch(task.concept))
        job.log.note("photos fetched", photos=len(pictures.photos))
        assignment = await self._in_pool(lambda: self._encode(job, pictures))
        self._assignments.put(assignment)
        if self._broken:  # looked at after the job is known: the engine's end cannot have missed it
            raise ActorBroken(self._broken)
        outcome = await asyncio.wrap_future(job.outcome)
        if outcome.embedding is None:
            raise ValueError(outcome.error or "the engine gave no reason")
        return await self._in_pool(lambda: self._publish(job, pictures.photos, outcome, attempt))

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _fetch(self, concept: Concept) -> _Pictures:
        photos, masks = open_pictures(concept, self._config.photos)
        return _Pictures(photos, masks)

    def _encode(self, job: _Job, pictures: _Pictures) -> Assignment:
        """Encode the photos once, see where to start, and take up the checkpoint that an earlier attempt may have left:
        with one, the rows are as it says, and the start only has its initializer."""
        config, folder = self._config, job.task.folder
        job.start = self._choose_start(job.task.concept, pictures.photos)
        concept = job.start.concept
        check_sample_prompts(self._backbone, concept, config.grid.of(concept.category))
        views = encode_views(
            self._backbone, pictures.photos, config.inversion.augment, concept.concept_id, config.seed, pictures.masks
        )
        state = None
        try:
            state = SlotState.from_bytes(self._store.get(folder.checkpoint))
        except FileNotFoundError:
            pass
        except ValueError as error:
            log.warning("concept %s starts anew: %s", concept.concept_id, error)
            job.log.note(f"starts anew: {error}")
        job.log.note("prepared", start=job.start.reason, step=state.step if state else 0)
        return Assignment(concept, views, state, job.start.embedding)

    def _run_engine(self) -> None:
        config = self._config
        try:
            features = self._extractor.pixel_features if self._extractor else None
            self._engine = Engine(
                self._backbone, config.inversion, slots=self._slots, seed=config.seed, image_features=features
            )
            self._engine.run(self._next_assignment, self._ended, self._checkpoint, config.actors.checkpoint_steps)
            self._broken = "the engine was closed"
        except BaseException as error:
            log.exception("the engine stopped")
            self._broken = f"the engine stopped: {type(error).__name__}: {error}"
        for job in list(self._jobs.values()):
            if not job.outcome.done():
                job.outcome.set_exception(ActorBroken(self._broken))

    def _next_assignment(self, wait: bool) -> Assignment | None:
        """Asked by the engine on its own thread; None while it waits ends it."""
        if self._draining and not wait:
            return None
        try:
            assignment = self._assignments.get(block=wait)
        except queue.Empty:
            return None
        if assignment is None:
            self._assignments.put(None)  # it will ask again, with `wait`, when its slots are empty
            return None
        self._jobs[assignment.concept.concept_id].in_slot = True
        return assignment

    def _ended(self, outcome: Outcome) -> None:
        job = self._jobs[outcome.concept.concept_id]
        job.in_slot = False
        job.outcome.set_result(outcome)

    def _checkpoint(self, concept: Concept, state: SlotState) -> None:
        """Handed to the pool, so that the engine never waits for storage; left out while the last is on its way."""
        job = self._jobs[concept.concept_id]
        if job.save is None or job.save.done():
            job.save = self._pool.submit(self._save, job, state)

    def _save(self, job: _Job, state: SlotState) -> None:
        try:
            self._store.put(job.task.folder.checkpoint, state.to_bytes())
            job.num_saves += 1
            tell = job.log.store if job.num_saves == 1 or self._draining else job.log.note  # the first: it was here
            tell("checkpoint", step=state.step)
        except OSError as error:  # the concept goes on; only a crash before the next checkpoint would cost more steps
            log.warning("a checkpoint of %s was not stored: %s", job.task.concept.concept_id, error)

    def _publish(self, job: _Job, photos: list[Image.Image], outcome: Outcome, attempt: int) -> ConceptRecord:
        """Everything the concept produced, then its record. Draws the sample pictures on the way."""
        assert outcome.embedding is not None
        assert job.start is not None
        folder, config = job.task.folder, self._config
        task = replace(job.task, concept=job.start.concept)
        provenance = {
            "model": config.model, "model_hash": self._backbone.model_hash(), "fingerprint": task.fingerprint,
            "start": job.start.reason,
        }  # fmt: skip
        embedding = replace(outcome.embedding, metadata={**outcome.embedding.metadata, **provenance})
        samples = draw_samples(self._backbone, task.concept, embedding, config.grid, config.seed)
        scores = score(self._extractor, photos, samples) if self._extractor else {}
        payload = {
            folder.embedding: dump_diffusers(embedding),
            folder.grid: to_png(samples.sheet(photos)),
            folder.curve: curve_parquet(outcome.curve, outcome.frozen_losses),
        }
        if embedding.adapter:
            payload[folder.adapter] = dump_adapter(embedding)
        files = {path.rpartition("/")[2]: self._put_checked(path, data) for path, data in payload.items()}
        if job.save is not None:
            concurrent.futures.wait([job.save])  # else it could land after the checkpoint is deleted
        self._store.delete(folder.checkpoint)
        self._store.delete(folder.failure)
        judged = verdict(scores, config.gate)
        if judged == BELOW and config.gate.ladder:  # before the record: with that, the concept counts as learned
            self._store.put(folder.ladder, b"{}")
        record = _record(
            task, "done", attempt, start=job.start.reason, steps=outcome.steps, seconds=outcome.seconds, scores=scores,
            files=files, gate=judged,
        )  # fmt: skip
        job.log.store("published", steps=outcome.steps, seconds=round(outcome.seconds, 1), scores=scores)
        put_record(self._store, record)
        return record

    def _put_checked(self, path: str, data: bytes) -> StoredFile:
        """Write, read back and compare: a record must never vouch for bytes that are not there."""
        self._store.put(path, data)
        back = self._store.get(path)
        if back != data:
            raise OSError(f"{self._store.uri(path)}: {len(data)} bytes were written, {len(back)} others read back")
        return StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def failure_record(task: ConceptTask, error: str, attempts: int) -> ConceptRecord:
    """For a concept that cannot be learned: what was asked for and why it failed."""
    return _record(task, "failed", attempts, error=redact(error))


def _record(task: ConceptTask, status: Literal["done", "failed"], attempts: int, **facts: Any) -> ConceptRecord:
    concept = task.concept
    return ConceptRecord(
        concept_id=concept.concept_id,
        fingerprint=task.fingerprint,
        status=status,
        placeholder_token=concept.placeholder_token,
        initializer=concept.initializer,
        category=concept.category,
        num_vectors=concept.num_vectors,
        images=tuple(redact(uri) for uri in concept.images),
        attempts=attempts,
        finished_at=now(),
        carried=task.carried,
        inputs=task.inputs,
        **facts,
    )


def curve_parquet(curve: Tensor, frozen_losses: Tensor) -> bytes:
    """[n, 3] rows of (step, loss, norm) as a Parquet file; [looks, 2] rows of (step, loss on the frozen batch), where
    anybody looked, are one column more, null at the other steps."""
    steps, losses, norms = curve.unbind(1)
    columns = {"step": steps.int().numpy(), "loss": losses.numpy(), "norm": norms.numpy()}
    if len(frozen_losses):
        looks = dict(frozen_losses.tolist())
        columns["frozen_loss"] = pa.array([looks.get(step) for step in steps.tolist()], pa.float32())
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
