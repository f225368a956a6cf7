"""The examples of a training in Ray's object store: any worker reads any of them by concept id.

Ray Data reads the Parquet parts once, as tasks on all nodes, into blocks of a few examples. Blocks stay on the nodes
that read them, overflow to disks, are copied to where they are wanted, and are made again if a node is lost. A shard of
Ray Data's stream would be cheaper to read, but its order depends on timing and on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from pipeline.encoder_training.examples import PARTS, parse_example
from pipeline.store.addresses import filesystem_for_workers
from pipeline.store.storage import RunStore
from textual_inversion.encoder_training import ConceptExample

_COLUMNS = ["concept_id", "concept", "tensors"]

_ROWS_PER_BLOCK = 8
"""Examples of one block, which is moved as a whole: few, as a step wants examples from anywhere."""


@dataclass(frozen=True, slots=True)
class ExampleBlocks:
    """Examples in Ray's object store. Small; every worker gets one."""

    blocks: Sequence[Any]
    """References to Arrow tables with the columns `concept_id`, `concept` and `tensors`."""
    places: Mapping[str, tuple[int, int]]
    """Concept id -> its block and its row in the block."""

    def read(self, concept_ids: Sequence[str]) -> list[ConceptExample]:
        """Return the examples of these concepts; blocks of other nodes are copied to this one."""
        numbers = sorted({self.places[concept_id][0] for concept_id in concept_ids})
        tables = dict(zip(numbers, ray.get([self.blocks[number] for number in numbers]), strict=True))
        rows = (self.places[concept_id] for concept_id in concept_ids)
        return [parse_example(tables[block].slice(row, 1).to_pylist()[0]) for block, row in rows]


def load_blocks(store: RunStore, row_ids: Mapping[str, str]) -> ExampleBlocks:
    """Read the examples with these row ids (row id -> concept id) into the object store."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False  # see bulk/stage.py
    filesystem, path = filesystem_for_workers(store.uri(PARTS))
    wanted = ray.put(frozenset(row_ids))

    # Functions of a function travel by value: tasks with them do not import this module, and torch with it.
    def keep(table: pa.Table) -> pa.Table:
        ids = ray.get(wanted)
        is_kept = [
            row_id in ids and status == "ok"
            for row_id, status in zip(table["row_id"].to_pylist(), table["status"].to_pylist(), strict=True)
        ]
        return table.filter(pa.array(is_kept, pa.bool_())).select(_COLUMNS)

    def concept_ids(table: pa.Table) -> list[str]:
        found: list[str] = table["concept_id"].to_pylist()
        return found

    blocks = (
        ray.data.read_parquet(path, filesystem=filesystem, columns=["row_id", "status", *_COLUMNS])
        .map_batches(keep, batch_size=None, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=_ROWS_PER_BLOCK)
        .to_arrow_refs()
    )
    list_names = ray.remote(concept_ids)
    names: list[list[str]] = ray.get([list_names.remote(block) for block in blocks])
    places = {name: (number, row) for number, block in enumerate(names) for row, name in enumerate(block)}
    return ExampleBlocks(blocks, places)
