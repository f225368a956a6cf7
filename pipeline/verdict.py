"""Decide what becomes of an actor, of its concepts and of the run when a call fails: whose fault is it?

Pure functions, with a row of the table in `decide` for each case. The driver applies what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Literal

from ray.exceptions import RayTaskError

from pipeline.store.errors import (
    ActorBroken,
    ActorLeaving,
    InputChanged,
    RunAborted,
    StoreFailed,
    describe_bug,
    describe_error,
)
from textual_inversion.errors import BAD_INPUT, BUG, LOST_WORKER, STORAGE, ErrorKind

MAX_REPLANS = 2
"""Times a concept is planned anew because its photos changed after the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Limits beyond which the driver gives up on a concept, an actor or the run."""

    max_actors: int
    actor_capacity: Callable[[], int] | None = None
    """Function that returns how many actors the cluster holds now; asked repeatedly, and the greater number counts."""
    max_attempts: int = 3
    """Calls lost to a dying actor or to storage before a concept counts as failed."""
    max_start_failures: int = 3
    """Actors in a row that did not start before the run is aborted (or goes on with those that did)."""
    max_fruitless_deaths: int = 10
    """Actors in a row that died with no concept finished in between before the run is aborted. A concept that kills
    again when it is alone counts once."""
    max_store_failures: int = 10
    """Failures in a row of the run's own storage, with longer and longer pauses, before the run is aborted."""
    backoff_s: float = 1.0
    """Wait after the first failed start or failure of storage; doubles with each further one, up to a minute."""
    drain_s: float = 20.0
    """Time for running concepts to write a checkpoint when the run is stopped."""
    stall_s: float = 0.0
    """Time after which a call that is being worked on counts as hung and its actor as lost; 0 for never."""
    calls_ahead: int = 0
    """Calls of an actor that wait for their turn."""
    start_s: float = 0.0
    """Time without a ready actor after which the run is aborted; 0 for no bound while a node is alive."""
    needs: Mapping[str, float] = field(default_factory=dict)
    """Resources that Ray reserves for an actor, for the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorFacts:
    """State of an actor when a call to it failed."""

    num_calls: int = 1
    """Calls it had, the failed one included."""
    runs_suspect: bool = False
    """True if it was given one suspect and nothing else."""
    is_leaving: bool = False
    """True if its node has notice to be taken back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkFacts:
    """History of a concept in this run."""

    lost_calls: int = 0
    """Calls lost with an actor, or to the photos' store."""
    lost_alone: int = 0
    """Calls lost with an actor that had no other call."""
    replans: int = 0
    """Times it was planned anew."""

    @property
    def num_calls(self) -> int:
        """Calls that have ended without a record of the concept."""
        return self.lost_calls + self.replans


class Fate(Enum):
    """Ways in which a concept goes on, or ends, after a failed call."""

    HAND_BACK = auto()
    """The concept is the next of the queue that it came from: the call proves nothing about it."""
    RETRY = auto()
    """The concept is called again when its turn comes."""
    RETRY_ALONE = auto()
    """The concept is a suspect and is called again on an actor that has nothing else."""
    WAIT_FOR_STORAGE = auto()
    """The concept is the next, after a pause that holds for all calls."""
    REPLAN = auto()
    """The concept is planned anew, from its photos as they are now."""
    FAIL = auto()
    """The concept ends with a failed record."""
    ABORT = auto()
    """The whole run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Fate of a concept, its history from now on, and the reason if it fails or the run is aborted."""

    fate: Fate
    work: WorkFacts
    is_retry: bool = True
    """True if the call counts as made again (metric `concepts_retried`)."""
    text: str = ""
    kind: ErrorKind = BUG
    is_quarantined: bool = False


ActorFate = Literal["stays", "leaves", "lost"]


def actor_fate(error: Exception) -> ActorFate:
    """Return what a failed call says about its actor."""
    cause = cause_of(error)
    if isinstance(cause, ActorBroken) or not isinstance(error, RayTaskError):
        return "lost"
    return "leaves" if isinstance(cause, ActorLeaving) else "stays"


def proves_nothing(error: Exception, actor: ActorFacts) -> bool:
    """Return whether the actor was lost with its node, which was taken back. Ray may know of that only afterwards."""
    return actor.is_leaving or bool(getattr(error, "preempted", False))


def decide(
    error: Exception, actor: ActorFacts, work: WorkFacts, max_attempts: int, *, is_to_blame: bool = True
) -> Verdict:
    """Return what becomes of a concept whose call failed with this error. `is_to_blame` is False for a concept whose
    actor was lost because another of its calls hung.

    Error                                       | Actor, concept              | Fate
    ------------------------------------------- | --------------------------- | ----------------------------
    actor lost                                  | node taken back             | HAND_BACK
    actor lost                                  | another call hung           | HAND_BACK
    actor lost, by a bug (ActorBroken.kind)     | alone, lost before          | FAIL, bug
    actor lost                                  | calls left                  | RETRY_ALONE
    actor lost                                  | no calls left               | FAIL, kind of the loss, quarantined
    ActorLeaving                                |                             | HAND_BACK, no retry
    StoreFailed (the run's own storage)         |                             | WAIT_FOR_STORAGE
    InputChanged                                | replans left                | REPLAN, no retry
    InputChanged                                | no replans left             | FAIL, bad input
    other OSError (the photos' store)           | calls left                  | RETRY
    other OSError                               | no calls left               | FAIL, storage, quarantined
    RunAborted (the actor refuses to serve)     |                             | ABORT
    any other exception of the actor's code     |                             | FAIL, bug
    """
    cause = cause_of(error)
    fate = actor_fate(error)
    if fate == "lost":
        if proves_nothing(error, actor) or not is_to_blame:
            return Verdict(fate=Fate.HAND_BACK, work=work)
        return _lost_with_actor(error, actor, work, max_attempts)
    if fate == "leaves":
        return Verdict(fate=Fate.HAND_BACK, work=work, is_retry=False)
    if isinstance(cause, StoreFailed):
        return Verdict(fate=Fate.WAIT_FOR_STORAGE, work=work)
    if isinstance(cause, InputChanged):
        return _input_changed(cause, work)
    if isinstance(cause, OSError):
        return _lost(error, replace(work, lost_calls=work.lost_calls + 1), max_attempts, STORAGE, Fate.RETRY)
    if isinstance(cause, RunAborted):
        return Verdict(fate=Fate.ABORT, work=work, text=str(cause))
    failed = replace(work, lost_calls=work.lost_calls + 1)
    return Verdict(fate=Fate.FAIL, work=failed, text=describe_bug(error), kind=BUG)


def cause_of(error: Exception) -> BaseException:
    """Return the exception that an actor raised, which Ray wraps in one of its own."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error


def _lost_with_actor(error: Exception, actor: ActorFacts, work: WorkFacts, max_attempts: int) -> Verdict:
    cause = cause_of(error)
    kind: ErrorKind = cause.kind if isinstance(cause, ActorBroken) else LOST_WORKER
    is_alone = actor.num_calls == 1
    lost = replace(work, lost_calls=work.lost_calls + 1, lost_alone=work.lost_alone + is_alone)
    if kind == BUG and is_alone and lost.lost_calls > 1:
        text = (
            "bug in this software, which stopped its actor again when the concept was alone: "
            f"{describe_error(error)}; the traceback is in the concept's log.jsonl"
        )
        return Verdict(fate=Fate.FAIL, work=lost, text=text, kind=BUG)
    return _lost(error, lost, max_attempts, kind, Fate.RETRY_ALONE)


def _lost(error: Exception, lost: WorkFacts, max_attempts: int, kind: ErrorKind, retry: Fate) -> Verdict:
    """Return `retry`, or a failure once as many calls are lost as are allowed."""
    if lost.lost_calls < max_attempts:
        return Verdict(fate=retry, work=lost)
    alone = f", {lost.lost_alone} of them alone" if lost.lost_alone else ""
    text = f"given up after {lost.lost_calls} lost calls{alone}; the last: {describe_error(error)}"
    return Verdict(fate=Fate.FAIL, work=lost, text=text, kind=kind, is_quarantined=True)


def _input_changed(cause: InputChanged, work: WorkFacts) -> Verdict:
    anew = replace(work, replans=work.replans + 1)
    if anew.replans <= MAX_REPLANS:
        return Verdict(fate=Fate.REPLAN, work=anew, is_retry=False)
    text = (
        f"{cause}, {anew.replans} times in this run: it is not learned while its photos are being written; run the "
        "same command again when they no longer change"
    )
    return Verdict(fate=Fate.FAIL, work=replace(work, lost_calls=work.lost_calls + 1), text=text, kind=BAD_INPUT)
