"""Bounds on the deaths of a stage's actors, which Ray Data itself replaces, and whose calls it repeats, without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import RunConfig

CALL_ATTEMPTS = 4
"""Times that the same rows are given to an actor; each time but the last, one of them may have killed it."""
STARTS_PER_ACTOR = 31
"""Starts of actors for each actor of the pool; in a long stage an actor meets more deaths than any one row."""


class DeathCounter:
    """Counts of a stage's starts and attempts, in an actor of their own: those that die take no count with them."""

    def __init__(self) -> None:
        self._starts = 0
        self._attempts: dict[str, int] = {}
        """Row id -> attempts so far, of the first row of each call that has not ended."""

    def start(self) -> int:
        """Count the start of an actor, and return the number so far."""
        self._starts += 1
        return self._starts

    def begin(self, row_id: str) -> int:
        """Count an attempt of the call whose first row this is, and return the number so far."""
        self._attempts[row_id] = self._attempts.get(row_id, 0) + 1
        return self._attempts[row_id]

    def end(self, row_id: str) -> None:
        """Forget a call that has ended; it may have run twice, if its actor was only taken for dead."""
        self._attempts.pop(row_id, None)


def on_this_node(actor_class: type) -> ActorHandle[Any]:
    """Start an actor that holds no core on the driver's node, whose loss ends the stage anyway."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: ActorHandle[Any] = ray.remote(num_cpus=0, scheduling_strategy=here)(actor_class).remote()
    return actor


def too_many_deaths(num_deaths: int) -> str:
    """Return why a stage ends whose actors have died so often."""
    return (
        f"the stage's actors have died {num_deaths} times; see the logs of Ray's workers for the cause, most often a "
        "lack of memory"
    )


def rows_that_kill(batch: pa.Table, attempts: int) -> RuntimeError:
    """Return the error that ends a stage when as many actors died of the same rows."""
    first, last = (batch["row_id"][place].as_py() for place in (0, -1))
    return RuntimeError(
        f"rows {first} to {last} were given to an actor {attempts} times, and each time it died; one of them may kill "
        "it"
    )


class BoundedWorker:
    """A stage's worker that ends the stage when it has died too often."""

    def __init__(self, config: RunConfig, worker: bytes, counter: ActorHandle[Any], max_starts: int) -> None:
        """Make the worker. `worker`: its class, pickled, because loading its modules may already kill an actor.

        Raises RuntimeError if this is more than the `max_starts`-th start.
        """
        starts = ray.get(counter.start.remote())
        if starts > max_starts:
            raise RuntimeError(too_many_deaths(starts - 1))
        make: Callable[[RunConfig], Callable[[pa.Table], pa.Table]] = ray.cloudpickle.loads(worker)
        self._worker = make(config)
        self._counter = counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the worker's result for a batch. Raises RuntimeError if its rows were tried too often."""
        if not batch.num_rows:
            return self._worker(batch)
        first = batch["row_id"][0].as_py()
        attempts = ray.get(self._counter.begin.remote(first))
        if attempts > CALL_ATTEMPTS:
            raise rows_that_kill(batch, attempts - 1)
        result = self._worker(batch)
        ray.get(self._counter.end.remote(first))
        return result
