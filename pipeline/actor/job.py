"""A concept on its way through an actor."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from pipeline.actor.concept_log import ConceptLog
from pipeline.ledger.plan import ConceptTask
from pipeline.report.concept_progress import ConceptProgress
from textual_inversion.engine import Assignment, Outcome
from textual_inversion.slots import SlotProgress
from textual_inversion.start_choice import ChosenStart
from textual_inversion.strips import Strip


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded photos and masks of a concept."""

    photos: list[Image.Image]
    masks: list[Image.Image]
    """Masks, one for each photo and of its size; empty if the concept has none."""


@dataclass(eq=False, slots=True)
class Job:
    """One attempt at a concept, and what is known of it so far."""

    task: ConceptTask
    attempt: int
    """Number of this call for the concept in the run, from 1."""
    log: ConceptLog
    start: ChosenStart | None = None
    """Start of the concept's rows; chosen when its photos are there."""
    assignment: Assignment | None = None
    """Input of the engine, brought up to date by each state that the engine hands over."""
    outcome: Future[Outcome] = field(default_factory=Future)
    in_slot: bool = False
    """True while the engine is learning it."""
    strip: Strip = field(default_factory=Strip)
    """Previews drawn so far, those of earlier attempts that it goes on from included."""
    strip_put: Future[bool] | None = None
    """Last strip on its way to storage."""
    save: Future[None] | None = None
    """Last checkpoint on its way to storage."""
    is_new: bool = False
    """True if no earlier attempt left anything in the concept's folder."""
    num_saves: int = 0
    """Checkpoints stored in this attempt."""
    was_saved: bool = False
    """True if there is, or may be, a checkpoint of it in storage."""


def progress_of(job: Job, in_slot: SlotProgress | None) -> ConceptProgress:
    """Return how far a job is; `in_slot` is how far its concept is in the engine, None if it is not there."""
    name = job.task.concept.concept_id
    if in_slot is not None and not job.outcome.done():
        step, steps, loss = in_slot.step, in_slot.steps, in_slot.loss
        return ConceptProgress(concept_id=name, phase="learning", step=step, steps=steps, loss=loss)
    if job.outcome.done():
        return ConceptProgress(concept_id=name, phase="publishing")
    return ConceptProgress(concept_id=name, phase="preparing" if job.assignment is None else "waiting")
