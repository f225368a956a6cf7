"""An actor for the real driver that learns nothing: what is left of a concept is what the pipeline adds to learning.

A module of its own, without torch, so that Ray's workers import no more than they need.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from pipeline.plan import ConceptTask
from pipeline.records import ConceptRecord, now, put_record
from pipeline.storage import RunStore

FILES = {"learned_embeds.safetensors": 4_000, "grid.png": 100_000, "curve.parquet": 10_000}
"""What a concept leaves, in bytes, of about the size that Stable Diffusion 1.5 makes them."""

POOL_THREADS = 4
"""As `pipeline.actors`."""


class NoLearning:
    """Answers at once, or, with an output, as soon as a concept's files and its record are stored."""

    def __init__(self, capacity: int, output: str = "") -> None:
        self._capacity = capacity
        self._store = RunStore(output) if output else None
        self._pool = ThreadPoolExecutor(POOL_THREADS)

    def ready(self) -> int:
        return self._capacity

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        record = ConceptRecord(
            concept_id=task.concept.concept_id, fingerprint=task.fingerprint, status="done", attempts=attempt,
            placeholder_token=task.concept.placeholder_token, images=task.concept.images, carried=task.carried,
            finished_at=now(),
        )  # fmt: skip
        if self._store is not None:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._publish, self._store, record)
        return record

    async def drain(self, seconds: float) -> None:
        """There is nothing to save."""

    def _publish(self, store: RunStore, record: ConceptRecord) -> None:
        """Written and read back, the record last, as actors do."""
        for name, size in FILES.items():
            store.put(record.folder.file(name), bytes(size))
            if len(store.get(record.folder.file(name))) != size:
                raise OSError(f"{name} of {record.concept_id} was not stored whole")
        put_record(store, record)
