"""`results.parquet`: one row a concept, made from the records and the manifest's bad rows."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable, Sequence
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
_SPOOLED = _SCHEMA.append(pa.field("others", pa.binary()))
_BATCH_ROWS = 2000
_SCORE = "score\0"
"""Prefix of columns of scores."""
_CARRIED = "carried\0"
"""Prefix of columns of the manifest; like `_SCORE`, it keeps equal names apart until the names are final."""
_LARGEST_EXACT = 2**53
"""Largest whole number up to which a double holds every whole number."""

_Row = tuple[dict[str, Any], dict[str, Any]]
"""Values of our own columns, and those of scores and of the manifest, by name."""


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
    # A column's type is known when all rows were seen. The rows wait on disk until then, so that memory holds a batch.
    with tempfile.TemporaryFile() as spool:
        types = _spool(rows, spool)
        spool.seek(0)
        names = _final_names([*_OWN, *types])
        schema = pa.schema(zip(names, [*_SCHEMA.types, *types.values()], strict=True))
        buffer = io.BytesIO()
        num_rows = 0
        with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
            for batch in pa.ipc.open_stream(spool):
                *own, texts = batch.columns
                others = [json.loads(text) for text in texts.to_pylist()]
                arrays = [_array(name, [each.get(name) for each in others], type) for name, type in types.items()]
                writer.write_table(pa.table([*own, *arrays], schema))
                num_rows += batch.num_rows
    store.put(PATH, buffer.getvalue())
    return num_rows


def _row(store: RunStore | None, record: ConceptRecord) -> _Row:
    own = {name: getattr(record, name, None) for name in _OWN}
    own["tries"] = max(1, len(record.tries))
    if record.status == "done":
        own["prompt_as"] = record.name_in_prompts
        paths = {"embedding": record.result.embedding, "grid": record.result.grid}
        own |= paths if store is None else {name: redact(store.uri(path)) for name, path in paths.items()}
    return own, {_SCORE + name: value for name, value in record.scores.items()} | _carried(record)


def _carried(row: ConceptRecord | BadRow) -> dict[str, Any]:
    return {_CARRIED + name: value for name, value in row.carried.items()}


def _bad_row(row: BadRow) -> _Row:
    error = f"{row.file} row {row.row}: {row.reason}"
    own = {"concept_id": row.concept_id, "status": "failed", "error": error, "error_kind": BAD_INPUT}
    return own, _carried(row)


def _spool(rows: Iterable[_Row], spool: IO[bytes]) -> dict[str, pa.DataType]:
    """Write our own columns as they will be, and those of scores and of the manifest as one of JSON text; return the
    types of the latter."""
    found: dict[str, _ColumnValues] = {}
    rows = iter(rows)
    with pa.ipc.new_stream(spool, _SPOOLED) as stream:
        while batch := list(islice(rows, _BATCH_ROWS)):
            arrays = [_array(name, [own.get(name) for own, _ in batch], _SCHEMA.field(name).type) for name in _OWN]
            # a file's name need not be UTF-8
            texts = [json.dumps(others, ensure_ascii=False).encode("utf-8", "replace") for _, others in batch]
            stream.write_batch(pa.record_batch([*arrays, pa.array(texts, pa.binary())], _SPOOLED))
            for _, others in batch:
                for name, value in others.items():
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
    except UnicodeEncodeError:
        return _array(name, [_encodable(value) for value in values], type)
    except (ValueError, TypeError, OverflowError):
        return pa.array([value if _fits(value, type) else None for value in values], type)


def _encodable(value: Any) -> Any:
    """Return a text, or texts, without lone surrogates, which a file's name that is not UTF-8 may have."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [_encodable(each) for each in value] if isinstance(value, list | tuple) else value


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
