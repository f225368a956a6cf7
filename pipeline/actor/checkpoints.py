"""Store, load and delete the checkpoints of concepts that an actor learns."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.actor.job import Job
from pipeline.store.errors import is_client_error
from pipeline.store.storage import RunStore
from textual_inversion.engine import SlotState

log = logging.getLogger(__name__)

_THREADS = 4


class Checkpoints:
    """Checkpoints of one actor's concepts, written on threads of their own: they wait for no pictures."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoints")

    def load(self, job: Job) -> SlotState | None:
        """Return the state that an earlier attempt left; None if there is none, or it is damaged."""
        if job.is_new:
            return None
        try:
            data = self._store.get(job.task.folder.checkpoint)
        except FileNotFoundError:
            return None
        job.was_saved = True
        try:
            return SlotState.from_bytes(data)
        except ValueError as error:
            log.warning("concept %s starts anew: %s", job.task.concept.concept_id, error)
            job.log.note(f"starts anew: {error}")
            return None

    def save(self, job: Job, state: SlotState, *, is_last: bool) -> None:
        """Begin to store a state, so that the caller never waits for storage.

        A state is left out while the one before is on its way, unless it is the last. The first and the last one are
        noted in the concept's stored log.
        """
        if job.save is None or job.save.done() or is_last:
            job.save = self._pool.submit(self._save, job, state, job.save, is_last)

    def delete(self, job: Job) -> None:
        """Delete the checkpoint when all writes of it have ended. Raises what a write raised that is no storage's
        error."""
        if job.save is not None:
            job.save.result()  # else it could land after the deletion
        if job.was_saved:
            self._store.delete(job.task.folder.checkpoint)

    def close(self) -> None:
        """Wait for the checkpoints that are being written."""
        self._pool.shutdown()

    def _save(self, job: Job, state: SlotState, former: Future[None] | None, is_last: bool) -> None:
        if former is not None:
            former.result()  # else it could land after this one
        job.was_saved = True
        try:
            self._store.put(job.task.folder.checkpoint, state.to_bytes())
        except Exception as error:
            if not (isinstance(error, OSError) or is_client_error(error)):
                raise
            # the concept goes on; only a crash before the next checkpoint would cost more steps
            log.warning("a checkpoint of %s was not stored: %s", job.task.concept.concept_id, error)
            return
        job.num_saves += 1
        tell = job.log.store if job.num_saves == 1 or is_last else job.log.note
        tell("checkpoint", step=state.step)
