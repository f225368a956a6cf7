"""Fleets of actors for one call of the scheduling loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.config import RunConfig
from pipeline.driver import drive
from pipeline.fleet import Fleet, NewActor
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.verdict import Policy
from pipeline.work_queue import WorkQueue


def drive_alone(
    tasks: Iterable[ConceptTask], new_actor: NewActor, policy: Policy, *rest: Any, **options: Any
) -> Iterator[ConceptRecord]:
    """Run tasks of one rung on a fleet of their own, and dismiss it; yield their records. The other arguments are those
    of `drive`."""
    fleet = Fleet(new_actor, policy)
    try:
        for _, record in drive(WorkQueue(iter(tasks)), fleet, [RunConfig()], *rest, **options):
            yield record
    finally:
        fleet.dismiss()
