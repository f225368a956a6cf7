"""Rows of a bulk stage in storage: its plan, and its results, which are the record of what is done.

Every row has a `row_id`, the digest of all that its result depends on. Results add a `status` and an `error`; rows
whose results say `ok` are left out of the next plan.
"""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger.digest import digest
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

PLAN_PART_ROWS = 65_536
"""Rows of one Parquet part of a plan."""

_THREADS = 8
"""Parts of results that are read at a time: each takes some requests, whose times add up to hours for 10^7 pictures."""


@dataclass(frozen=True, slots=True)
class StageRows:
    """The rows that a stage is asked for, by id."""

    wanted: Mapping[str, str]
    """Row id -> concept id of every row that is asked for."""

    missing: Collection[str]
    """Ids of the rows without a good result; the plan holds these."""

    @property
    def num_done(self) -> int:
        """Rows that already have a good result."""
        return len(self.wanted) - len(self.missing)


def row_id(*parts: object) -> str:
    """Return the id of a row whose result depends on these JSON values."""
    return digest(parts, escape_non_ascii=True)


def plan_missing(
    store: RunStore, folder: str, rows: Iterable[dict[str, Any]], schema: pa.Schema, done: Collection[str]
) -> StageRows:
    """Write the rows that have no good result as the plan in `folder`; rows with the same id are written once.

    `done` holds the ids of the rows that have one, see `done_row_ids`.
    """
    wanted: dict[str, str] = {}
    missing: set[str] = set()

    def to_write() -> Iterator[dict[str, Any]]:
        for row in rows:
            if row["row_id"] not in done and row["row_id"] not in missing:
                missing.add(row["row_id"])
                yield row
            wanted[row["row_id"]] = row["concept_id"]

    put_plan(store, folder, to_write(), schema)
    return StageRows(wanted, missing)


def put_plan(store: RunStore, folder: str, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    """Write a plan in parts, and delete the parts that only an earlier, longer plan had."""
    paths = set[str]()
    while part := list(islice(rows, PLAN_PART_ROWS)):
        path = f"{folder}/part-{len(paths):05d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, schema), buffer)
        store.put(path, buffer.getvalue())
        paths.add(path)
    for stale in set(store.list(folder)) - paths:
        store.delete(stale)


def done_row_ids(store: RunStore, results: str) -> set[str]:
    """Return the ids of the rows whose results say `ok`."""
    done: set[str] = set()
    for part in read_parts(store, results, ["row_id", "status"]):
        done.update(part["row_id"].filter(pc.equal(part["status"], "ok")).to_pylist())
    return done


def read_results(store: RunStore, results: str, columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of every whole part, part by part, with these columns or all that the part has.

    A part that a crash cut short is deleted, so that its rows are planned again.
    """
    return (part.to_pylist() for part in read_parts(store, results, columns))


def read_parts(store: RunStore, results: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yield every whole part in the order of their paths, read a few parts ahead; see `read_results`."""

    def read(path: str) -> pa.Table | None:
        try:
            with open_for_reading(store.uri(path)) as file:
                return read_table(file, columns)
        except pa.ArrowInvalid as error:
            log.warning("%s is not a whole Parquet file and was deleted: %s", store.uri(path), error)
            store.delete(path)
            return None

    paths = iter(sorted(store.list(results)))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="results") as pool:
        ahead = deque(pool.submit(read, path) for path in islice(paths, _THREADS))
        while ahead:
            part = ahead.popleft().result()
            ahead.extend(pool.submit(read, path) for path in islice(paths, 1))
            if part is not None:
                yield part
