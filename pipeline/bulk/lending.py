"""Lend the run's live actors to the workers of a drawing stage.

Ray Data divides the plan and writes the results. Its workers hold neither a model nor a core: they borrow an actor for
each batch. Who has which actor is known at a desk, an actor of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from pipeline.bulk.deaths import CALL_ATTEMPTS, STARTS_PER_ACTOR, on_this_node, rows_that_kill, too_many_deaths
from pipeline.config import RunConfig
from pipeline.fleet import Fleet
from pipeline.store.errors import RunAborted, describe_bug, describe_error

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Longest time between two looks at the fleet."""


class Desk:
    """The actors that are lent, and who has them."""

    def __init__(self) -> None:
        self._actors: list[ActorHandle[Any]] = []
        self._lost: set[ActorHandle[Any]] = set()
        """Actors that were lost in a borrower's hands, which the fleet may learn later."""
        self._loans: dict[str, ActorHandle[Any]] = {}
        """Borrower -> the actor it has."""
        self._end = ""
        self._changed = asyncio.Condition()

    async def lend(self, actors: Sequence[ActorHandle[Any]]) -> None:
        """Lend these actors from now on, and no others."""
        async with self._changed:
            self._actors = list(actors)
            self._changed.notify_all()

    async def end(self, reason: str) -> None:
        """Lend no more actors; all who wait for one, and who come later, are told the reason."""
        async with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    async def borrow(self, borrower: str) -> ActorHandle[Any]:
        """Return an actor that nobody has, once there is one. Whatever the borrower had is given back: it was started
        again, if it did not do so itself. Raises RuntimeError when no actor is lent any more.
        """
        async with self._changed:
            self._loans.pop(borrower, None)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._end or self._free())
            if self._end:
                raise RuntimeError(self._end)
            self._loans[borrower] = self._free()[0]
            return self._loans[borrower]

    async def give_back(self, borrower: str, *, is_lost: bool) -> None:
        """Take a borrower's actor back, to be lent again unless it is lost."""
        async with self._changed:
            actor = self._loans.pop(borrower, None)
            if is_lost and actor is not None:
                self._lost.add(actor)
            self._changed.notify_all()

    def _free(self) -> list[ActorHandle[Any]]:
        taken = {*self._loans.values(), *self._lost}
        return [actor for actor in self._actors if actor not in taken]


class Borrower:
    """A stage's worker without a model, which has each batch drawn by an actor that it borrows."""

    def __init__(self, desk: ActorHandle[Any], _config: RunConfig) -> None:
        self._desk = desk
        self._name = ray.get_runtime_context().get_actor_id()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return what an actor makes of the batch. Raises RuntimeError if too many die of it, or none is lent."""
        for _ in range(CALL_ATTEMPTS):
            actor = ray.get(self._desk.borrow.remote(self._name))
            is_lost = False
            try:
                return ray.get(actor.draw.remote(batch))
            except RayActorError as error:
                is_lost = True
                ray.kill(actor)  # it may live, out of the borrower's reach; the fleet replaces what is dead
                log.warning("an actor was lost while it drew: %s", describe_error(error))
            finally:
                self._desk.give_back.remote(self._name, is_lost=is_lost)
        raise rows_that_kill(batch, CALL_ATTEMPTS)


@contextmanager
def lending(fleet: Fleet, num_actors: int) -> Iterator[ActorHandle[Any]]:
    """Lend so many of the fleet's actors in the block, started or replaced where that is needed; yield the desk."""
    fleet.use(lambda handle: handle.prepare_drawing.remote())
    desk = on_this_node(Desk)
    is_over = threading.Event()
    keeper = threading.Thread(target=_keep_lent, args=(fleet, num_actors, desk, is_over), name="lending", daemon=True)
    keeper.start()
    try:
        yield desk
    finally:
        is_over.set()
        keeper.join()
        desk.end.remote("the stage is over")


def _keep_lent(fleet: Fleet, num_actors: int, desk: ActorHandle[Any], is_over: threading.Event) -> None:
    """Keep the fleet at its size, and the desk told of the actors that are ready, until the stage is over; end lending
    when actors do not start, or die too often."""
    lent: list[Any] = []
    starts_left = STARTS_PER_ACTOR * num_actors
    try:
        while not is_over.is_set():
            before = len(fleet.workers)
            fleet.resize(num_actors)
            starts_left -= max(0, len(fleet.workers) - before)
            if starts_left < 0:
                raise RunAborted(too_many_deaths(STARTS_PER_ACTOR * num_actors))
            for event in fleet.wait({}, _LOOK_S):
                if (error := fleet.take_note(event)) is not None:
                    log.warning("an actor that draws was lost: %s", describe_error(error))
                    fleet.remove(event.worker)
            ready = [worker.handle for worker in fleet.ready() if not worker.is_leaving]
            if ready != lent:
                lent = ready
                desk.lend.remote(ready)
    except RunAborted as error:
        desk.end.remote(str(error))
    except Exception as error:
        log.exception("the actors that draw are no longer looked after")
        desk.end.remote(describe_bug(error))
