"""Decide what becomes of a concept, its actor and the run when a call to an actor fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray.exceptions import RayTaskError

from pipeline.store.errors import ActorBroken, PhotosUnreachable, describe_error
from textual_inversion.errors import LOST_WORKER, STORAGE, ErrorKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How far the driver goes before it gives up on a concept, an actor or the run."""

    max_actors: int
    room: Callable[[], int] | None = None
    """Asked again and again for how many actors the cluster holds by now; the greater number counts."""
    max_attempts: int = 3
    """Calls lost to a dying actor or to storage before a concept counts as failed."""
    max_start_failures: int = 3
    """Actors in a row that did not start before the run is aborted (or goes on with those that did)."""
    max_fruitless_deaths: int = 10
    """Actors in a row that died with no concept finished in between before the run is aborted; what kills again when
    it is alone counts once."""
    max_store_failures: int = 10
    """Times in a row that the run's own storage failed, with longer and longer pauses, before the run is aborted."""
    backoff_s: float = 1.0
    """Wait after the first failed start or failure of storage; doubles with each further one, up to a minute."""
    drain_s: float = 20.0
    """When the run is stopped: time for running concepts to write a checkpoint."""
    stall_s: float = 0.0
    """A call that is being worked on for this long hangs, and its actor is as good as dead; 0 never."""
    calls_ahead: int = 0
    """Of an actor's calls, those that wait for their turn."""


def kind_of_loss(error: Exception) -> ErrorKind:
    """Return the kind of the error that a call was lost with."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ActorBroken):
        return cause.kind
    return STORAGE if isinstance(cause, PhotosUnreachable) else LOST_WORKER


def bug_text(error: Exception) -> str:
    """Return the line of a record for an exception that an actor does not know."""
    return f"bug in this software, not a fault of the concept: {describe_error(error)}"
