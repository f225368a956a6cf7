"""The command with actors that note every step in a file, so that the steps lost to a kill can be counted.

The workers import this module, which is why it is separate from the tests.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import cluster, run
from pipeline.actor import learner
from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.job import Job
from pipeline.actor.learner import Learner
from pipeline.actor.model_loading import LoadedModel
from pipeline.config import RunConfig
from pipeline.model_actor import ModelActor
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept
from textual_inversion.engine import Engine, NextAssignment, OnCheckpoint, OnOutcome
from textual_inversion.slot_state import SlotState

STEP, HANDED, STORED = "step", "handed", "stored"
"""Events of a step: it was taken, its state was handed over to be stored, its state is in storage."""


class Notes:
    """A process's own file next to the run's output, with lines of time (ns), concept, event and step."""

    def __init__(self, output: str) -> None:
        folder = notes_of(Path(output))
        folder.mkdir(exist_ok=True)
        self._file = os.open(folder / str(os.getpid()), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def __call__(self, concept: Concept, what: str, step: int) -> None:
        os.write(self._file, f"{time.time_ns()} {concept.concept_id} {what} {step}\n".encode())


def notes_of(output: Path) -> Path:
    return output.with_name(f"{output.name}-notes")


class CountedActor(ModelActor):
    """An actor that notes the steps and checkpoints of its learners."""

    def new_learner(self, config: RunConfig, model: LoadedModel) -> Learner:
        note = Notes(config.output)
        learner.Engine = partial(CountedEngine, note=note)  # type: ignore[assignment,misc]
        learner.Checkpoints = partial(CountedCheckpoints, note=note)  # type: ignore[assignment,misc]
        return super().new_learner(config, model)


class CountedCheckpoints(Checkpoints):
    def __init__(self, store: RunStore, note: Notes) -> None:
        super().__init__(store)
        self._note = note

    def save(self, job: Job, state: SlotState, *, is_last: bool) -> None:
        former, concept = job.save, job.task.concept
        super().save(job, state, is_last=is_last)
        if job.save is not None and job.save is not former:
            self._note(concept, HANDED, state.step)
            job.save.add_done_callback(lambda _: self._note(concept, STORED, state.step))


class CountedEngine(Engine):
    def __init__(self, *arguments: object, note: Notes, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._note = note

    def run(
        self, next_assignment: NextAssignment, on_outcome: OnOutcome, on_checkpoint: OnCheckpoint | None = None,
        checkpoint_steps: int = 0, **others: Any,
    ) -> None:  # fmt: skip
        """Run the engine with a checkpoint after every step, and pass on those that are due."""

        def after_step(concept: Concept, state: SlotState) -> None:
            self._note(concept, STEP, state.step)
            if on_checkpoint and state.step % checkpoint_steps == 0:
                on_checkpoint(concept, state)

        def after_last(outcome: learner.Outcome) -> None:
            self._note(outcome.concept, STEP, outcome.steps)
            on_outcome(outcome)

        super().run(next_assignment, after_last, after_step, checkpoint_steps=1, **others)


@dataclass(frozen=True)
class Attempt:
    """Events that one actor noted for one concept."""

    concept: str
    notes: list[tuple[int, str, int]]
    """Time (ns), event and step, in order."""

    @property
    def steps(self) -> list[int]:
        return [step for _, what, step in self.notes if what == STEP]

    @property
    def begun(self) -> int:
        """Number of steps that were taken before the attempt."""
        return self.steps[0] - 1

    def unsaved(self, after: int) -> int:
        """Count the steps above `after` that were taken while no checkpoint was on its way to storage."""
        on_the_way, count = set(), 0
        for _, what, step in self.notes:
            if what == HANDED:
                on_the_way.add(step)
            elif what == STORED:
                on_the_way.discard(step)
            else:
                count += step > after and not on_the_way
        return count


def attempts(output: Path) -> dict[str, list[Attempt]]:
    """Return the attempts that took a step, by concept and in order."""
    found: dict[str, list[Attempt]] = {}
    for path in notes_of(output).iterdir():
        notes: dict[str, list[tuple[int, str, int]]] = {}
        for line in path.read_text().splitlines():
            at, concept, what, step = line.split()
            notes.setdefault(concept, []).append((int(at), what, int(step)))
        for concept, told in notes.items():
            found.setdefault(concept, []).append(Attempt(concept, told))
    return {concept: sorted(those, key=lambda one: one.notes[0]) for concept, those in found.items()}


def main() -> None:
    """Run `python -m pipeline.run` with these actors."""
    cluster.ModelActor = CountedActor  # type: ignore[misc]
    sys.exit(run.main())
