"""A concept on its way through an actor: what is known of it so far."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from pipeline.actor.concept_log import ConceptLog
from pipeline.ledger.plan import ConceptTask
from textual_inversion.engine import Assignment, Outcome
from textual_inversion.start_choice import ChosenStart


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a concept is learned from, opened."""

    photos: list[Image.Image]
    masks: list[Image.Image]
    """None, or one a photo and of its size."""


@dataclass(eq=False, slots=True)
class Job:
    """One attempt at a concept."""

    task: ConceptTask
    log: ConceptLog
    start: ChosenStart | None = None
    """Chosen when its photos are there."""
    outcome: Future[Outcome] = field(default_factory=Future)
    save: Future[None] | None = None
    """Its last checkpoint on the way to storage."""
    assignment: Assignment | None = None
    """What the engine was given, brought up to date by its checkpoints."""
    in_slot: bool = False
    num_saves: int = 0
    was_saved: bool = False
    """There is, or may be, a checkpoint of it."""
