"""Run an actor's engine on a thread of its own: jobs go in, and the future of each gets its outcome.

When the device runs out of memory, another engine with half the slots takes its place (`slot_budget`), and each concept
goes on from the last state that the engine handed over.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.failures import broken_by
from pipeline.actor.job import Job
from pipeline.actor.slot_budget import BudgetState, SlotBudget
from pipeline.store.errors import ActorBroken, ActorLeaving, describe_error
from textual_inversion.concept import Concept
from textual_inversion.engine import Assignment, Engine, OnPreview, Outcome, SlotState
from textual_inversion.slots import SlotProgress

log = logging.getLogger(__name__)


class EngineThread:
    """The engine of an actor, and the assignments that wait for a slot."""

    def __init__(
        self,
        new_engine: Callable[[int], Engine],
        budget: SlotBudget,
        jobs: Mapping[str, Job],
        checkpoints: Checkpoints,
        checkpoint_steps: int,
        on_preview: OnPreview | None = None,
        preview_steps: int = 0,
    ) -> None:
        """Make the first engine and start the thread. `new_engine` makes one with so many slots; `jobs` are those of
        the actor by concept id, as they come and go; `on_preview` and `preview_steps` are those of `Engine.run`.

        Raises ValueError if the settings do not go with the model, ActorBroken if one slot finds no memory.
        """
        self._new_engine = new_engine
        self._budget = budget
        self._jobs = jobs
        self._checkpoints = checkpoints
        self._checkpoint_steps = checkpoint_steps
        self._on_preview = on_preview
        self._preview_steps = preview_steps
        self._waiting: queue.Queue[Assignment | None] = queue.Queue()
        """Assignments without a slot; None wakes the engine, which then ends."""
        self._is_draining = False
        self._is_leaving = False
        self._is_closed = threading.Event()
        self._broken: ActorBroken | None = None
        self._steps_before = 0
        """Steps of the engines before the present one."""
        self._engine: Engine | None = None
        self._start_engine()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> ActorBroken | None:
        """Reason why there is no engine any more; None while there is one."""
        return self._broken

    @property
    def steps_taken(self) -> int:
        """Steps taken with all concepts since the actor started."""
        engine = self._engine
        return self._steps_before + (engine.steps_taken if engine else 0)

    def progress(self) -> list[SlotProgress]:
        """Return how far each concept in a slot is."""
        engine = self._engine
        return engine.progress() if engine else []

    def submit(self, job: Job) -> None:
        """Let a prepared concept wait for a slot. Raises ActorBroken if there is no engine any more."""
        assert job.assignment is not None
        self._waiting.put(job.assignment)
        if self._broken:  # looked at after the job is known: the thread's end cannot have missed it
            raise self._broken

    def save_soon(self) -> None:
        """Store a checkpoint of each concept in a slot after the present step."""
        if engine := self._engine:
            engine.save_soon()

    def drain(self) -> None:
        """Begin no more concepts, and store a checkpoint of each in a slot."""
        self._is_draining = True
        self.save_soon()

    def leave(self) -> None:
        """Begin no more concepts, return those that wait to the driver, and store a checkpoint of each in a slot."""
        self._is_leaving = True
        self.save_soon()

    def shrink(self) -> None:
        """Stop the engine after the present step, so that another takes its place."""
        if engine := self._engine:
            engine.stop()

    def close(self) -> None:
        """Stop the engine after the present step and wait for the thread's end. Concepts in slots are given up."""
        self._is_closed.set()
        self._waiting.put(None)
        self.shrink()
        self._thread.join()

    def _start_engine(self) -> None:
        """Make an engine with as many slots as find memory. Raises ActorBroken if one slot finds none."""
        while self._engine is None:
            try:
                self._engine = self._new_engine(self._budget.slots)
            except torch.OutOfMemoryError as error:
                self._give_up_slots(describe_error(error))

    def _run(self) -> None:
        try:
            while not self._is_closed.is_set():
                self._run_engine()
                self._replace_engine()
            raise ActorBroken("the engine was closed")
        except ActorBroken as error:
            self._broken = error
        except BaseException as error:
            log.exception("the engine stopped")
            self._broken = broken_by(error)
        for job in list(self._jobs.values()):
            if not job.outcome.done():
                job.outcome.set_exception(self._broken)

    def _run_engine(self) -> None:
        """Run the engine until it is stopped or finds no memory, and give up slots if there is too little of it."""
        assert self._engine is not None
        if self._budget.state is BudgetState.SHRINKING:  # reported while there was no engine to stop
            self._engine.stop()
        try:
            self._engine.run(
                self._next_assignment,
                self._on_outcome,
                self._on_checkpoint,
                self._checkpoint_steps,
                on_preview=self._on_preview,
                preview_steps=self._preview_steps,
            )
        except torch.OutOfMemoryError as error:
            self._give_up_slots(describe_error(error))
        if self._budget.state is BudgetState.SHRINKING:
            self._give_up_slots("photos or sample pictures found no memory")

    def _replace_engine(self) -> None:
        """Make another engine for the concepts that are in slots, unless the thread is to end."""
        if self._is_closed.is_set():
            return
        self._requeue_concepts_in_slots()
        self._steps_before = self.steps_taken
        self._engine = None
        torch.cuda.empty_cache()
        try:
            self._start_engine()
        except ValueError as error:  # a file that the engine reads was replaced: the next actor says what it has
            raise ActorBroken(str(error)) from error

    def _give_up_slots(self, shortage: str) -> None:
        """Halve the slots. Raises ActorBroken if there is only one."""
        before = self._budget.slots
        if not self._budget.halve():
            raise ActorBroken(f"the device has no memory for one slot: {shortage}")
        log.warning("%d slots instead of %d from now on: %s", self._budget.slots, before, shortage)

    def _requeue_concepts_in_slots(self) -> None:
        """Let the concepts that were in slots wait for one again, before all others."""
        in_slots = [job for job in list(self._jobs.values()) if job.in_slot]
        waiting = [job.assignment for job in in_slots]
        for job in in_slots:
            job.in_slot = False
        while not self._waiting.empty():
            waiting.append(self._waiting.get())
        for assignment in waiting:
            self._waiting.put(assignment)

    def _next_assignment(self, wait: bool) -> Assignment | None:
        """Return the next concept for a slot. The engine asks on its own thread; None, when it waits, ends it."""
        while not (self._is_draining or self._is_closed.is_set()):
            try:
                assignment = self._waiting.get(block=wait)
            except queue.Empty:
                return None
            if assignment is None:
                return None
            job = self._jobs[assignment.concept.concept_id]
            if not self._is_leaving:
                job.in_slot = True
                return assignment
            job.outcome.set_exception(ActorLeaving())
        if wait:
            self._is_closed.wait()  # its process is about to end
        return None

    def _on_outcome(self, outcome: Outcome) -> None:
        job = self._jobs[outcome.concept.concept_id]
        job.in_slot = False
        job.outcome.set_result(outcome)

    def _on_checkpoint(self, concept: Concept, state: SlotState) -> None:
        """Take a concept's state, from which it goes on if this engine stops, and store it."""
        job = self._jobs[concept.concept_id]
        assert job.assignment is not None
        job.assignment = replace(job.assignment, state=state)
        if self._checkpoint_steps:
            self._checkpoints.save(job, state, is_last=self._is_draining)
        if self._is_leaving:
            self._next_assignment(wait=False)  # returns all that waits for a slot to the driver
