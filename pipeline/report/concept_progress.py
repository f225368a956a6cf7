"""Progress of single concepts inside the actors, and the rate and the time left that follow from their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.times import format_clock

_LEAST_S = 5.0
"""Time of learning from which on a rate is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptProgress:
    """A concept in an actor's hands at one moment."""

    concept_id: str
    phase: Literal["preparing", "waiting", "learning", "publishing"]
    """`preparing` its photos and start, `waiting` for a slot, `learning`, or `publishing`, which draws and stores."""
    step: int = 0
    """Optimizer steps taken."""
    steps: int = 0
    """Largest number of steps; 0 where it is not known yet."""
    loss: float | None = None
    """Last loss read."""

    @property
    def share_done(self) -> float:
        """Share of its steps that are taken, from 0 to 1."""
        if self.phase == "publishing":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0


class StepRates:
    """Rates of the concepts in flight and of the whole stage, from their steps at several moments."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        """Time of the first step that was seen, and the work done until then."""
        self._now = 0.0
        self._work = 0.0
        """Concepts done, those in flight by the share of their steps."""
        self._steps: dict[str, tuple[float, int]] = {}
        """Concept id -> time and number of its first step that was seen in this attempt."""
        self._per_s: dict[str, float] = {}

    def update(self, now: float, num_ended: int, in_flight: Sequence[ConceptProgress]) -> None:
        """Take in the state at the time `now`, in seconds: concepts that ended, and those in flight."""
        self._now = now
        self._work = num_ended + sum(each.share_done for each in in_flight)
        if self._began is None and any(each.step for each in in_flight):
            self._began = now, self._work
        learning = {each.concept_id: each.step for each in in_flight if each.phase == "learning"}
        self._steps = {
            name: self._steps[name] if name in self._steps and self._steps[name][1] <= step else (now, step)
            for name, step in learning.items()
        }
        self._per_s = {
            name: (learning[name] - before) / (now - at)
            for name, (at, before) in self._steps.items()
            if now > at and learning[name] > before
        }

    def steps_per_s(self, concept_id: str) -> float:
        """Return a concept's rate since it was first seen in its slot; 0 if it is not known."""
        return self._per_s.get(concept_id, 0.0)

    def total_steps_per_s(self) -> float:
        """Return the rate of all concepts in slots together."""
        return sum(self._per_s.values())

    def seconds_left(self, total: float) -> float | None:
        """Estimate the time until `total` concepts have ended, from the work since the first step; None before there is
        any to go by."""
        if self._began is None:
            return None
        at, before = self._began
        if self._now - at < _LEAST_S or self._work <= before:
            return None
        return max(0.0, total - self._work) * (self._now - at) / (self._work - before)


def describe_steps(in_flight: Sequence[ConceptProgress], rates: StepRates, batch_size: int) -> str:
    """Return steps, loss and rate of all concepts in slots in a few words; empty if none is in a slot."""
    learning = [each for each in in_flight if each.phase == "learning"]
    if not learning:
        return ""
    first, last = min(each.step for each in learning), max(each.step for each in learning)
    parts = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"]
    losses = [each.loss for each in learning if each.loss is not None]
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.4f}")
    if per_s := rates.total_steps_per_s():
        parts.append(f"{per_s * batch_size:.1f} samples/s")
    return ", ".join(parts)


def describe_concept(each: ConceptProgress, rates: StepRates, batch_size: int) -> str:
    """Return what is known of one concept, without its name."""
    words = {"preparing": "reads its photos", "waiting": "waits for a slot", "publishing": "draws its sample pictures"}
    if each.phase != "learning":
        return words[each.phase]
    parts = [f"step {each.step:,} of {each.steps:,}"]
    if each.loss is not None:
        parts.append(f"loss {each.loss:.4f}")
    if per_s := rates.steps_per_s(each.concept_id):
        parts.append(f"{per_s * batch_size:.1f} samples/s")
        parts.append(f"{format_clock((each.steps - each.step) / per_s)} left")
    return "  ".join(parts)
