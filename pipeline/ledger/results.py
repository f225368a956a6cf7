"""`results.parquet`: one row a concept, made from the records and the manifest's bad rows."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from types import NoneType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import ConceptRecord
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from textual_inversion.errors import BAD_INPUT

PATH = "results.parquet"

_SCHEMA = pa.schema(
    [
        ("concept_id", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("error_kind", pa.string()),
        ("placeholder_token", pa.string()),
        ("initializer", pa.string()),
        ("prompt_as", pa.string()),
        ("start", pa.string()),
        ("category", pa.string()),
        ("num_vectors", pa.int32()),
        ("images", pa.list_(pa.string())),
        ("steps", pa.int32()),
        ("seconds", pa.float64()),
        ("attempts", pa.int32()),
        ("gate", pa.string()),
        ("tries", pa.int32()),
        ("finished_at", pa.string()),
        ("fingerprint", pa.string()),
        ("embedding", pa.string()),
        ("grid", pa.string()),
    ]
)
_OWN = dict.fromkeys(_SCHEMA.names)
"""Names of our own columns, in their order."""
_BATCH_ROWS = 2000
_SCORE = "score\0"
"""Prefix of columns of scores."""
_CARRIED = "carried\0"
"""Prefix of columns of the manifest; like `_SCORE`, it keeps equal names apart until the names are final."""
_LARGEST_EXACT = 2**53
"""Largest whole number up to which a double holds every whole number."""


def write_results(
    store: RunStore, records: Iterable[ConceptRecord], bad: Sequence[BadRow] = (), *, absolute: bool = False
) -> int:
    """Write the table and return its number of rows.

    Bad rows of the manifest are failed rows, with file and row in the error and with their carried columns. Every
    score has a column. Carried columns keep their names, with `manifest_` in front where a name is taken; nested
    values, values of a column with several types, and numbers that no type of Arrow holds are JSON text. No value makes
    the table fail. The paths of embeddings and grids are relative to the output unless `absolute`.
    """
    rows = chain((_row(store if absolute else None, record) for record in records), (_bad_row(row) for row in bad))
    columns = {field.name: field.type for field in _SCHEMA}
    # A column's type is known when all rows were seen. The rows wait on disk until then, so that memory holds a batch.
    with tempfile.TemporaryFile() as spool:
        columns |= _spool(rows, spool)
        spool.seek(0)
        schema = pa.schema(zip(_final_names(list(columns)), columns.values(), strict=True))
        buffer = io.BytesIO()
        num_rows = 0
        with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
            while batch := [json.loads(line) for line in islice(spool, _BATCH_ROWS)]:
                arrays = [_array(name, [row.get(name) for row in batch], type) for name, type in columns.items()]
                writer.write_table(pa.table(arrays, schema))
                num_rows += len(batch)
    store.put(PATH, buffer.getvalue())
    return num_rows


def _row(store: RunStore | None, record: ConceptRecord) -> dict[str, Any]:
    row = {name: getattr(record, name, None) for name in _OWN}
    row["tries"] = max(1, len(record.tries))
    if record.status == "done":
        row["prompt_as"] = record.name_in_prompts
        paths = {"embedding": record.result.embedding, "grid": record.result.grid}
        row |= paths if store is None else {name: redact(store.uri(path)) for name, path in paths.items()}
    row |= {_SCORE + name: value for name, value in record.scores.items()}
    return row | {_CARRIED + name: value for name, value in record.carried.items()}


def _bad_row(row: BadRow) -> dict[str, Any]:
    error = f"{row.file} row {row.row}: {row.reason}"
    own = {"concept_id": row.concept_id, "status": "failed", "error": error, "error_kind": BAD_INPUT}
    return own | {_CARRIED + name: value for name, value in row.carried.items()}


def _spool(rows: Iterable[Mapping[str, Any]], spool: IO[bytes]) -> dict[str, pa.DataType]:
    """Write each row as a line of JSON, and return the types of the columns of scores and of the manifest."""
    found: dict[str, _ColumnValues] = {}
    for row in rows:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")  # a file's name need not be UTF-8
        spool.write(line + b"\n")
        for name, value in row.items():
            if name not in _OWN:
                values = found.setdefault(name, _ColumnValues())
                if value is not None:
                    values.add(value)
    return {name: pa.float64() if name.startswith(_SCORE) else values.type() for name, values in found.items()}


@dataclass(slots=True)
class _ColumnValues:
    """Types of a column's JSON values so far, and the range of its whole numbers."""

    types: set[type] = field(default_factory=set)
    lowest: int = 0
    highest: int = 0

    def add(self, value: Any) -> None:
        self.types.add(type(value))
        if type(value) is int:
            self.lowest = min(self.lowest, value)
            self.highest = max(self.highest, value)

    def type(self) -> pa.DataType:
        """Return the Arrow type that holds every value as it is; text if there is none."""
        if not self.types:
            return pa.null()
        if self.types == {bool}:
            return pa.bool_()
        if self.types == {int} and self.lowest >= -(2**63) and self.highest < 2**63:
            return pa.int64()
        if self.types == {int} and self.lowest == 0 and self.highest < 2**64:
            return pa.uint64()
        is_exact = self.lowest >= -_LARGEST_EXACT and self.highest <= _LARGEST_EXACT
        return pa.float64() if float in self.types <= {int, float} and is_exact else pa.string()


def _array(name: str, values: Sequence[Any], type: pa.DataType) -> pa.Array:
    """Return a column's values as an Arrow array; null for a value of our own columns that their type does not hold, as
    only a damaged record has it."""
    if name.startswith(_CARRIED) and pa.types.is_string(type):
        is_plain = (str, NoneType)
        values = [value if isinstance(value, is_plain) else json.dumps(value, ensure_ascii=False) for value in values]
    try:
        return pa.array(values, type)
    except (ValueError, TypeError, OverflowError):
        return pa.array([value if _fits(value, type) else None for value in values], type)


def _fits(value: Any, type: pa.DataType) -> bool:
    try:
        pa.scalar(value, type)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _final_names(names: list[str]) -> list[str]:
    """Return the names without their prefixes; a carried column gets another name where ours has it."""
    taken = {name.removeprefix(_SCORE) for name in names if not name.startswith(_CARRIED)}
    final = []
    for name in names:
        if name.startswith(_CARRIED):
            name = name.removeprefix(_CARRIED)
            while name in taken:
                name = f"manifest_{name}"
            taken.add(name)
        final.append(name.removeprefix(_SCORE))
    return final
