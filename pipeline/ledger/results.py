"""`results.parquet`: one row a concept, made from the records and the manifest's bad rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import ConceptRecord
from pipeline.store.parquet import read_table
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
_BATCH_ROWS = 2000
_SCORE = "score\0"
"""Prefix of columns of scores."""
_CARRIED = "carried\0"
"""Prefix of columns of the manifest; like `_SCORE`, it keeps equal names apart until the names are final."""


def write_results(store: RunStore, records: Iterable[ConceptRecord], bad: Sequence[BadRow] = ()) -> int:
    """Write the table and return its number of rows.

    Bad rows of the manifest are failed rows, with file and row in the error. Every score has a column. Carried columns
    keep their names, with `manifest_` in front where a name is taken; nested values, and values of a column with
    several types, are JSON text.
    """
    rows = chain((_row(store, record) for record in records), (_bad_row(row) for row in bad))
    # A column's type is known when all rows were seen. The rows wait on disk until then, so that memory holds a batch.
    with tempfile.TemporaryDirectory() as folder:
        spooled: list[Path] = []
        schemas: list[pa.Schema] = []
        for table in _tables(rows):
            spooled.append(Path(folder, f"{len(spooled)}.parquet"))
            pq.write_table(table, spooled[-1])
            schemas.append(table.schema)
        mixed = _mixed_columns(schemas)
        empty = [_as_text(schema.empty_table(), mixed) for schema in schemas]
        whole = pa.concat_tables(empty, promote_options="permissive")
        names = _final_names(whole.schema.names)
        num_rows = 0
        path = Path(folder, PATH)
        with pq.ParquetWriter(path, whole.rename_columns(names).schema, compression="zstd") as writer:
            for part in spooled:
                table = _as_text(read_table(part), mixed)
                table = pa.concat_tables([whole, table], promote_options="permissive").rename_columns(names)
                writer.write_table(table)
                num_rows += table.num_rows
        store.put(PATH, path.read_bytes())
    return num_rows


def _row(store: RunStore, record: ConceptRecord) -> dict[str, Any]:
    row = {name: getattr(record, name, None) for name in _SCHEMA.names}
    row["tries"] = max(1, len(record.tries))
    if record.status == "done":
        row["prompt_as"] = record.name_in_prompts
        row |= {"embedding": redact(store.uri(record.result.embedding)), "grid": redact(store.uri(record.result.grid))}
    row |= {_SCORE + name: value for name, value in record.scores.items()}
    return row | {_CARRIED + name: value for name, value in record.carried.items()}


def _bad_row(row: BadRow) -> dict[str, Any]:
    error = f"{row.file} row {row.row}: {row.reason}"
    return {"concept_id": row.concept_id, "status": "failed", "error": error, "error_kind": BAD_INPUT}


def _tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    yield _SCHEMA.empty_table()
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH_ROWS)):
        columns = {field.name: pa.array([row.get(field.name) for row in batch], field.type) for field in _SCHEMA}
        for name in dict.fromkeys(name for row in batch for name in row if name not in columns):
            values = [row.get(name) for row in batch]
            columns[name] = pa.array(values, pa.float64()) if name.startswith(_SCORE) else _carried_array(values)
        yield pa.table(columns)


def _carried_array(values: list[Any]) -> pa.Array:
    if any(isinstance(value, dict | list) for value in values):
        return _json_array(values)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several types
        return _json_array(values)


def _json_array(values: list[Any]) -> pa.Array:
    """Return texts as they are and all other values as JSON."""
    is_plain = (str, type(None))
    texts = [value if isinstance(value, is_plain) else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(texts, pa.string())


def _mixed_columns(schemas: Sequence[pa.Schema]) -> set[str]:
    """Return the carried columns with several types in different batches; whole and other numbers count as one type."""
    types: dict[str, set[str]] = {}
    for schema in schemas:
        for field in schema:
            if field.name.startswith(_CARRIED) and not pa.types.is_null(field.type):
                is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
                types.setdefault(field.name, set()).add("number" if is_number else str(field.type))
    return {name for name, seen in types.items() if len(seen) > 1}


def _as_text(table: pa.Table, names: Collection[str]) -> pa.Table:
    for index, name in enumerate(table.schema.names):
        if name in names:
            table = table.set_column(index, name, _json_array(table.column(index).to_pylist()))
    return table


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
