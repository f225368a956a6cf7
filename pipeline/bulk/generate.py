"""The bulk stage on Ray Data: (concept, prompt, seed) rows of a Parquet plan -> pictures, and a metadata row for each.

The metadata rows are the record of what is done: rows that say `ok` are left out of the next plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from pipeline.bulk.lending import Borrower, lending
from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows
from pipeline.bulk.row_keys import done_keys, first_errors, plan_missing_keys
from pipeline.bulk.stage import Stage, run_stage
from pipeline.config import RunConfig
from pipeline.fleet import Fleet
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from pipeline.times import interrupting

PLAN = "images/plan"
METADATA = "images/metadata"

_BATCHES_PER_CALL = 8


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """Numbers of the pictures that were asked for, by how they ended."""

    done_before: int
    drawn: int
    failed: int
    first_errors: tuple[str, ...] = ()


def generate_images(
    config: RunConfig,
    records: Iterable[ConceptRecord],
    prompts: Sequence[Prompt],
    fleet: Fleet,
    until: float = math.inf,
) -> ImageCounts:
    """Draw every prompt with every concept of `records`, except the pictures that are drawn already.

    The fleet's actors draw; none is started where there is nothing to draw. Raises what `run_stage` does, and
    DeadlinePassed if it has something to draw at `until`, in seconds since 1970; the next run keeps what is written by
    then.
    """
    store = RunStore(config.output)
    wanted, missing = plan_missing_keys(
        store, PLAN, plan_rows(config, records, prompts), PLAN_SCHEMA, done_keys(store, METADATA)
    )
    failed = missing
    if missing:
        with interrupting(until):
            draw_plan(config, len(missing), fleet)
        failed = missing.minus(done_keys(store, METADATA))
    return ImageCounts(
        done_before=len(wanted) - len(missing),
        drawn=len(missing) - len(failed),
        failed=len(failed),
        first_errors=first_errors(store, METADATA, failed) if failed else (),
    )


def draw_plan(config: RunConfig, num_rows: int, fleet: Fleet) -> None:
    """Draw all rows of the plan. Raises what `run_stage` does."""
    num_calls = math.ceil(num_rows / config.generation.sampling.batch_size)
    with lending(fleet, min(fleet.max_actors(), num_calls)) as desk:
        run_stage(config, _stage(config, desk), num_rows, 0, fleet)


def _stage(config: RunConfig, desk: ActorHandle[Any]) -> Stage:
    return Stage(
        name="drawing",
        plan=PLAN,
        results=METADATA,
        worker=partial(Borrower, desk),
        rows_per_call=config.generation.sampling.batch_size,
        rows_per_part=config.generation.rows_per_part,
        calls_at_once=_BATCHES_PER_CALL,
    )
