"""Stand-in actors for the real driver, which learn nothing, so that only the pipeline's own cost is left.

The module imports no torch, so that Ray's workers import no more than they need.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import RunConfig
from pipeline.ledger.gate import verdict
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.report.concept_progress import ConceptProgress
from pipeline.sample_config import GateConfig
from pipeline.store.storage import RunStore
from pipeline.times import now

FILES = {"learned_embeds.safetensors": 4_000, "grid.png": 100_000, "curve.parquet": 10_000}
"""Sizes of a concept's files in bytes, about those with Stable Diffusion 1.5."""

LOG = bytes(800)
"""Content of a concept's log, about as long as those of concepts that had no trouble."""

POOL_THREADS = 4
"""Threads that store files, as in `pipeline.actor.learner`."""


class NoLearning:
    """Actor that answers at once, or, with an output, as soon as a concept's files and its record are stored."""

    def __init__(self, capacity: int, output: str = "") -> None:
        self._capacity = capacity
        self._store = RunStore(output) if output else None
        self._pool = ThreadPoolExecutor(POOL_THREADS)

    def prepare(self, _config: RunConfig) -> int:
        return self._capacity

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        record = ConceptRecord(
            concept_id=task.concept.concept_id,
            fingerprint=task.fingerprint,
            status="done",
            attempts=attempt,
            placeholder_token=task.concept.placeholder_token,
            images=task.concept.images,
            carried=task.carried,
            finished_at=now(),
        )
        if self._store is not None:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._publish, self._store, record)
        return record

    def progress(self) -> list[ConceptProgress]:
        """Return nothing: no concept takes a step."""
        return []

    def cpu_seconds(self) -> float:
        """Return the CPU time that the actor's process has taken."""
        return time.process_time()

    async def drain(self, seconds: float) -> None:
        """Do nothing: there are no checkpoints to save."""

    async def notice(self) -> None:
        """Wait for ever: the node is never taken back."""
        await asyncio.Event().wait()

    def _publish(self, store: RunStore, record: ConceptRecord) -> None:
        """Make the calls that an actor makes for a new concept: look for what earlier attempts left, put the files and
        check each, put the log, and the record last."""
        folder = record.folder
        if store.list(folder.root):
            raise FileExistsError(store.uri(folder.root))
        for name, size in FILES.items():
            store.put_checked(folder.file(name), bytes(size))
        store.put(folder.log, LOG)
        put_record(store, record)


class StandInWithFiles(NoLearning):
    """Stand-in that stores files a report can show, with scores made from the concept's fingerprint."""

    def __init__(self, capacity: int, output: str, files: Mapping[str, bytes]) -> None:
        super().__init__(capacity, output)
        self._files = dict(files)

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        assert self._store is not None
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._store_files, self._store, task, attempt
        )

    def _store_files(self, store: RunStore, task: ConceptTask, attempt: int) -> ConceptRecord:
        clip_i, clip_t = (byte / 255 for byte in hashlib.sha256(task.fingerprint.encode()).digest()[:2])
        scores = {"clip_i": 0.4 + 0.5 * clip_i, "clip_t": 0.2 + 0.1 * clip_t, "clip_i_initializer": 0.402}
        gate = verdict(scores, GateConfig())
        concept = task.concept
        record = ConceptRecord(
            concept_id=concept.concept_id,
            fingerprint=task.fingerprint,
            status="done",
            attempts=attempt,
            placeholder_token=concept.placeholder_token,
            initializer=concept.initializer,
            images=concept.images,
            carried=task.carried,
            inputs=task.inputs,
            steps=1,
            seconds=0.01,
            scores=scores,
            gate=gate,
            finished_at=now(),
        )
        for name, data in self._files.items():
            store.put(record.folder.file(name), data)
        put_record(store, record)
        return record
