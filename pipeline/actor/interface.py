"""The calls that the driver makes to an actor, as types; the driver and the stand-ins of tests share them."""

from __future__ import annotations

from typing import Any, ParamSpec, Protocol

import pyarrow as pa

from pipeline.config import RunConfig
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.concept_progress import ConceptProgress

P = ParamSpec("P")


class LearnerActor(Protocol):
    """An object that the driver can run as a Ray actor with `max_restarts=0`; methods may be coroutines."""

    def prepare(self, config: RunConfig) -> int:
        """Get ready to learn by these settings in place of any former ones, and return how many calls of `learn` it
        takes at a time. To be called while it has no other call."""
        ...

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        """Learn a concept and return its record, done or failed; `attempt` counts its calls in this run, from 1.

        Raises ActorBroken when the actor must be replaced, ActorLeaving when its node is taken back before it begins,
        StoreFailed when the run's storage fails, another OSError when the photos' store does, InputChanged when a photo
        is not what the task's fingerprint says, and RunAborted when it cannot serve this run at all, as for a task of
        other settings than it was prepared for. Any other exception counts as a bug of its code.
        """
        ...

    async def prepare_drawing(self) -> int:
        """Get ready to draw in bulk in place of learning, and return how many calls of `draw` it works on at a time."""
        ...

    async def draw(self, batch: pa.Table) -> pa.Table:
        """Draw the pictures of plan rows and store them; return a row for each, in the same order."""
        ...

    def progress(self) -> list[ConceptProgress]:
        """Return how far each of its concepts is."""
        ...

    async def drain(self, seconds: float) -> None:
        """Begin nothing more; return when running concepts have saved a checkpoint, or when time is up."""
        ...

    async def notice(self) -> None:
        """Return when the actor's node is to be taken back. From then on `learn` raises ActorLeaving for concepts that
        have not begun."""
        ...


class RemoteMethod(Protocol[P]):
    """A method of an actor in another process."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Start a call and return the reference to its result."""
        ...


class LearnerHandle(Protocol):
    """Ray's handle of a `LearnerActor`."""

    @property
    def prepare(self) -> RemoteMethod[[RunConfig]]: ...

    @property
    def learn(self) -> RemoteMethod[[ConceptTask, int]]: ...

    @property
    def prepare_drawing(self) -> RemoteMethod[[]]: ...

    @property
    def draw(self) -> RemoteMethod[[pa.Table]]: ...

    @property
    def progress(self) -> RemoteMethod[[]]: ...

    @property
    def drain(self) -> RemoteMethod[[float]]: ...

    @property
    def notice(self) -> RemoteMethod[[]]: ...
