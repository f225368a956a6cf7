"""Ids of up to 10^7 rows of a bulk stage, as keys of 16 bytes in sorted arrays: sets of their text take five times the
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bulk.rows import put_plan, read_parts
from pipeline.ledger.key_index import KeySet, Words, digest_words
from pipeline.store.storage import RunStore

_BATCH = 10_000
_PARTS = 64
"""Parts of results whose keys are added to a set together: to add a few takes as long as to add thousands."""


def done_keys(store: RunStore, results: str) -> KeySet:
    """Return the keys of the rows whose results say `ok`."""
    done = KeySet()
    parts = read_parts(store, results, ["row_id", "status"])
    good = (_keys(part["row_id"].filter(pc.equal(part["status"], "ok"))) for part in parts)
    while some := list(islice(good, _PARTS)):
        done.add(np.concatenate(some))
    return done


def plan_missing_keys(
    store: RunStore, folder: str, rows: Iterable[dict[str, Any]], schema: pa.Schema, done: KeySet
) -> tuple[KeySet, KeySet]:
    """Do what `rows.plan_missing` does; return the keys of the rows that are asked for, and of those in the plan."""
    wanted, missing = KeySet(), KeySet()

    def to_write() -> Iterator[dict[str, Any]]:
        rest = iter(rows)
        while batch := list(islice(rest, _BATCH)):
            keys = digest_words(row["row_id"] for row in batch)
            is_missing = wanted.add(keys) & ~done.has(keys)
            missing.add(keys[is_missing])
            yield from compress(batch, is_missing.tolist())

    put_plan(store, folder, to_write(), schema)
    return wanted, missing


def first_errors(store: RunStore, results: str, missing: KeySet, at_most: int = 5) -> tuple[str, ...]:
    """Return a few distinct errors of the rows in `missing`, in the order in which the parts hold them."""
    return tuple(islice(dict.fromkeys(_errors(store, results, missing)), at_most))


def _errors(store: RunStore, results: str, missing: KeySet) -> Iterator[str]:
    for part in read_parts(store, results, ["row_id", "error"]):
        is_missing = missing.has(_keys(part["row_id"]))
        yield from filter(None, compress(part["error"].to_pylist(), is_missing.tolist()))


def _keys(row_ids: pa.ChunkedArray) -> Words:
    return digest_words(row_id or "" for row_id in row_ids.to_pylist())
