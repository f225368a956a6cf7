"""Previews of concepts while they are learned: small pictures, drawn between two steps and kept as a strip.

No random stream of learning is touched, and no error of a preview ends anything: it is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.actor.job import Job
from pipeline.actor.samples import preview_request
from pipeline.config import RunConfig
from pipeline.ledger.records import StripFacts
from pipeline.store.errors import describe_error
from pipeline.store.storage import RunStore
from textual_inversion.engine import Outcome
from textual_inversion.families.base import Backbone
from textual_inversion.generate import generate
from textual_inversion.slots import Preview
from textual_inversion.strips import Strip

log = logging.getLogger(__name__)

_THREADS = 2


class Previews:
    """Previews of one actor's concepts. The strips are stored on threads of their own: learning waits for no store."""

    def __init__(self, backbone: Backbone, config: RunConfig, store: RunStore, jobs: Mapping[str, Job]) -> None:
        """Take the actor's jobs by concept id, as they come and go."""
        self._backbone = backbone
        self._config = config
        self._store = store
        self._jobs = jobs
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="previews")

    def resume(self, job: Job, step: int) -> None:
        """Take up the strip of a concept that goes on after `step` steps; it is begun anew at step 0."""
        if not (self._config.preview.steps and step):
            return
        try:
            job.strip = Strip.from_png(self._store.get(job.task.folder.previews)).until(step)
        except FileNotFoundError:
            return
        except Exception as error:  # on damaged files, PIL raises nearly everything
            _warn([job], "the earlier ones cannot be read", error)

    def draw(self, previews: Sequence[Preview]) -> None:
        """Draw concepts as they are, in batches, and begin to store their strips."""
        jobs = [self._jobs[each.concept.concept_id] for each in previews]
        try:
            self._add(jobs, previews)
        except Exception as error:
            _warn(jobs, f"not drawn at step {previews[0].step}", error)
            return
        for job in jobs:
            if job.strip_put is None or job.strip_put.done():  # else the next one brings this one's pictures, too
                job.strip_put = self._pool.submit(self._put, job, job.strip)

    def finish(self, job: Job, outcome: Outcome) -> StripFacts | None:
        """Draw a learned concept for the last time and store its strip; return what it shows, None without one."""
        if not self._config.preview.steps or outcome.embedding is None:
            return None
        assert job.start is not None
        if job.strip_put is not None:
            job.strip_put.result()  # else it could land after the last one
        try:
            self._add([job], [Preview(job.start.concept, outcome.steps, outcome.embedding)])
        except Exception as error:
            _warn([job], "the last one was not drawn", error)
        if not (job.strip.pictures and self._put(job, job.strip)):
            return None
        return StripFacts(steps=tuple(job.strip.pictures), cell_px=job.strip.cell_px)

    def close(self) -> None:
        """Wait for the strips that are being stored."""
        self._pool.shutdown()

    def _add(self, jobs: Sequence[Job], previews: Sequence[Preview]) -> None:
        """Draw the previews and add each to its job's strip."""
        config = self._config
        requests = [preview_request(concept, word, config.grid, config.seed) for concept, _, word in previews]
        sampling = replace(config.grid.sampling, steps=config.preview.sampling_steps)
        if self._backbone.device.type == "cpu" and config.actors.compile in ("auto", "off"):
            # elsewhere the denoiser may be compiled for whole batches, which padding fills
            sampling = replace(sampling, batch_size=min(sampling.batch_size, len(requests)))
        pictures = generate(self._backbone, requests, sampling)
        for job, preview, picture in zip(jobs, previews, pictures, strict=True):
            job.strip = job.strip.with_picture(preview.step, picture)

    def _put(self, job: Job, strip: Strip) -> bool:
        """Store a strip; return whether that was done."""
        try:
            self._store.put(job.task.folder.previews, strip.to_png())
        except Exception as error:
            _warn([job], "not stored", error)
            return False
        return True


def _warn(jobs: Sequence[Job], what: str, error: Exception) -> None:
    """Log that previews are missing, once for all jobs and in the log of each."""
    names = ", ".join(job.task.concept.concept_id for job in jobs)
    log.warning("previews of %s: %s: %s", names, what, describe_error(error))
    for job in jobs:
        job.log.note(f"previews: {what}", error=describe_error(error))
