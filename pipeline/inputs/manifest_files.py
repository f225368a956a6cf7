"""Files of a manifest: which there are, their columns, and their rows.

A manifest is Parquet, a table in text (`text_tables`), or a folder of photos (`photo_folders`), whose address ends with
`/` here. A folder `name=value` in the address of a Parquet file, as Hive, Spark, pandas and DuckDB write a partitioned
table, is a column of that file with one value. Python's values of the rows are in `cells`, their meaning in `manifest`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.cells import check_names, reason_for_text, rows, short_repr
from pipeline.inputs.photo_folders import folder_rows, has_pictures
from pipeline.inputs.text_tables import is_text_table, table_rows
from pipeline.store.addresses import absolute, files_of_folder, find_files, open_for_reading
from pipeline.store.parquet import iter_batches
from pipeline.store.redact import redact
from textual_inversion.errors import BadInput

CONCEPT_COLUMNS = (
    "concept_id",
    "images",
    "placeholder",
    "initializer",
    "category",
    "num_vectors",
    "masks",
    "captions",
    "start_from",
)
"""Columns that describe a concept; all others are carried to the results."""

PRIORITY = "priority"

UNDERSTOOD = (*CONCEPT_COLUMNS, PRIORITY)
"""Columns whose values mean something here."""

_LIST_COLUMNS = ("images", "masks", "captions")
_NUMBER_COLUMNS = ("num_vectors", PRIORITY)
_WHOLE_NUMBER = r"-?\d{1,18}"
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_BATCH_ROWS = 1024

_LISTINGS: ContextVar[dict[str, list[str] | None] | None] = ContextVar("listings", default=None)
"""Address of a folder -> its files, in a block of `list_folders_once`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """Columns and size of a manifest file."""

    names: tuple[str, ...]
    """Names of the columns, those that a Parquet file's folders name included; none for a folder of photos."""
    num_rows: int
    notes: tuple[str, ...] = ()
    """Remarks on columns that are carried as text, and on what is missing or not used in a folder of photos."""


@contextlib.contextmanager
def list_folders_once() -> Iterator[None]:
    """List each folder once in the block: a run reads its manifest several times, and is to find the same photos each
    time."""
    token = _LISTINGS.set({})
    try:
        yield
    finally:
        _LISTINGS.reset(token)


def manifest_files(uri: str) -> list[str]:
    """Return the addresses of a manifest's files, in the order of their names: those of a glob, the Parquet files of a
    folder, or a folder of photos, with `/` at the end. Raises ValueError if there are none."""
    uri = absolute(uri)
    inside = None if any(letter in uri for letter in "*?[") else _list_folder(uri)
    if inside and has_pictures(inside) and not any(path.endswith(".parquet") for path in inside):
        return [f"{uri}/"]
    files = find_files(uri, ".parquet")
    if not files:
        raise ValueError(
            f"no manifest at {redact(uri)}: give a folder of photos, a folder with a folder of photos for each "
            "concept, or a table: a Parquet, CSV or JSON lines file, a folder with *.parquet files, or a glob"
        )
    return files


def file_facts(file: str) -> FileFacts:
    """Return facts about a manifest file. Raises ValueError if it is no manifest."""
    if _is_parquet(file):
        schema, num_rows = _parquet_schema(file)
        reasons = {name: reason_for_text(schema.field(name).type) for name in schema.names if name not in UNDERSTOOD}
        as_text = (
            f"column {name!r} ({schema.field(name).type}) is carried as text: {reason}"
            for name, reason in reasons.items()
            if reason
        )
        return FileFacts(names=tuple(schema.names), num_rows=num_rows, notes=tuple(as_text))
    found, notes = _text_rows(file)
    names = dict.fromkeys(name for row in found if isinstance(row, dict) for name in row)
    return FileFacts(names=tuple(names), num_rows=len(found), notes=tuple(notes))


def file_rows(file: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | BadInput]:
    """Yield a manifest file's rows with all columns or with `columns`, or errors of rows that cannot be read.

    Raises pyarrow.ArrowException or OSError where a Parquet file is damaged.
    """
    if _is_parquet(file):
        for batch in batches(file, columns):
            yield from rows(batch, UNDERSTOOD)
        return
    for row in _text_rows(file)[0]:
        if isinstance(row, BadInput) or columns is None:
            yield row
        else:
            yield {name: row.get(name) for name in columns}


def _list_folder(uri: str) -> list[str] | None:
    """Return what `files_of_folder` does, in a block of `list_folders_once` as it was at first."""
    kept = _LISTINGS.get()
    if kept is None:
        return files_of_folder(uri)
    folder = uri.rstrip("/")
    if folder not in kept:
        kept[folder] = files_of_folder(folder)
    return kept[folder]


def _is_parquet(file: str) -> bool:
    return not file.endswith("/") and not is_text_table(file)


def _text_rows(file: str) -> tuple[list[dict[str, Any] | BadInput], list[str]]:
    """Return the rows of a table in text or of a folder of photos, and remarks. Raises ValueError if it is neither."""
    if file.endswith("/"):
        found, notes = folder_rows(file, _list_folder(file) or [])
        return [row if isinstance(row, BadInput) else _with_types(row) for row in found], notes
    try:
        table = [row for _, row in table_rows(file, _check_names)]
    except FileNotFoundError as error:
        raise ValueError(f"manifest {redact(file)} is not there any more") from error
    except (OSError, UnicodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"manifest {redact(file)} cannot be read: {redact(str(error))}") from error
    except ValueError as error:
        raise ValueError(f"manifest {redact(file)}: {error}") from error
    return [row if isinstance(row, BadInput) else _with_types(row) for row in table], []


def _with_types(row: Mapping[str, Any]) -> dict[str, Any] | BadInput:
    """Return a row whose lists and numbers may have been texts, as a table in text holds them.

    A list is JSON, or its items with `|` between. Text that is no number stays as it is, to be named as an error.
    """
    typed = {"concept_id": None, **row}
    for name, value in row.items():
        if name in _LIST_COLUMNS and value is not None:
            typed[name] = _list_in_text(value) if isinstance(value, str) else value
            if not isinstance(typed[name], list):
                return BadInput(f"{name} is {short_repr(value)}; it must be a list of texts")
        elif name in _NUMBER_COLUMNS and isinstance(value, str) and re.fullmatch(_WHOLE_NUMBER, value.strip()):
            typed[name] = int(value)
    return typed


def _list_in_text(text: str) -> Any:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return [item.strip() for item in text.split("|")]


def _parquet_schema(file: str) -> tuple[pa.Schema, int]:
    """Return the columns of a Parquet file, followed by those that its folders name, and its number of rows. Raises
    ValueError if it is no manifest."""
    try:
        with open_for_reading(file) as handle:
            footer = pq.read_metadata(handle)
            schema = footer.schema.to_arrow_schema()
            num_rows = footer.num_rows
    except FileNotFoundError as error:
        raise ValueError(f"manifest {redact(file)} is not there any more") from error
    except Exception as error:  # on damaged files Arrow raises nearly everything
        raise ValueError(f"manifest {redact(file)} cannot be read as Parquet: {redact(str(error))}") from error
    for name, value in partitions(file).items():
        schema = schema.append(pa.field(name, value.type))
    try:
        _check_schema(schema)
    except ValueError as error:
        raise ValueError(f"manifest {redact(file)}: {error}") from error
    return schema, num_rows


def batches(file: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file's rows in batches with all its columns or with `columns`, those of its folders included."""
    in_folders = {name: value for name, value in partitions(file).items() if columns is None or name in columns}
    in_file = None if columns is None else [name for name in columns if name not in in_folders]
    with open_for_reading(file) as handle:
        for batch in iter_batches(handle, in_file, _BATCH_ROWS):
            for name, value in in_folders.items():
                batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
            yield batch


def partitions(file: str) -> dict[str, pa.Scalar]:
    """Return the columns that a file's folders name (`category=style/num_vectors=4`) with their values.

    Values are text, percent-decoded; those of columns that hold numbers are numbers where they look like one.
    """
    found = {}
    path = file.partition("?")[0] if file.startswith(("http://", "https://")) else file
    for folder in posixpath.dirname(path).split("/"):
        name, equals, value = folder.partition("=")
        if name and equals:
            found[unquote(name)] = _partition_value(unquote(name), unquote(value))
    return found


def _partition_value(name: str, value: str) -> pa.Scalar:
    if value == _NULL_PARTITION:
        return pa.scalar(None, pa.string())
    is_number = name in _NUMBER_COLUMNS and re.fullmatch(_WHOLE_NUMBER, value)
    return pa.scalar(int(value)) if is_number else pa.scalar(value)


def _check_schema(schema: pa.Schema) -> None:
    """Raise ValueError if these are no columns of a manifest."""
    _check_names(schema.names)
    for name in _LIST_COLUMNS:
        if name in schema.names and not _can_hold_texts(schema.field(name).type, name):
            raise ValueError(f"column {name!r} is {schema.field(name).type}; it must be a list of strings")


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError if these are no names of a manifest's columns."""
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has two columns of the name {twice[0]!r}, in the file or as a folder 'name=value'")
    for name in ("concept_id", "images"):
        if name not in names:
            raise ValueError(f"it has no column {name!r}; it has {', '.join(names)}")
    check_names(names, UNDERSTOOD)


def _can_hold_texts(column_type: pa.DataType, name: str) -> bool:
    """Return True if a column can hold lists of texts; one that is empty in every row has the type null."""
    if pa.types.is_null(column_type):
        return name != "images"
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    if not (is_list or pa.types.is_fixed_size_list(column_type)):
        return False
    item = column_type.value_type
    may_be_empty = name != "images" and pa.types.is_null(item)
    return bool(
        pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_dictionary(item) or may_be_empty
    )
