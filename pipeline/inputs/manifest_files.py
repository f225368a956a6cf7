"""Files of a manifest: which there are, their columns, and their rows in batches.

A folder `name=value` in a file's address, as Hive, Spark, pandas and DuckDB write a partitioned table, is a column of
that file with one value. Python's values of the rows are in `cells`, their meaning in `manifest`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.cells import check_names, reason_for_text
from pipeline.store.addresses import absolute, find_files, open_for_reading
from pipeline.store.parquet import iter_batches
from pipeline.store.redact import redact

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
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """A manifest file as its footer and its address describe it."""

    schema: pa.Schema
    """Columns of the file, followed by those that its folders name."""
    num_rows: int

    def notes(self) -> Iterator[str]:
        """Yield a remark for each column that is carried as text because Python cannot hold its values."""
        for field in self.schema:
            reason = "" if field.name in UNDERSTOOD else reason_for_text(field.type)
            if reason:
                yield f"column {field.name!r} ({field.type}) is carried as text: {reason}"


def manifest_files(uri: str) -> list[str]:
    """Return the addresses of a manifest's files, in the order of their names. Raises ValueError if there are none."""
    files = find_files(absolute(uri), ".parquet")
    if not files:
        raise ValueError(f"no manifest at {redact(uri)}: give a Parquet file, a folder with *.parquet files, or a glob")
    return files


def file_facts(file: str) -> FileFacts:
    """Return the columns and the number of rows of a manifest file. Raises ValueError if it is no manifest."""
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
    return FileFacts(schema=schema, num_rows=num_rows)


def batches(file: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield a manifest file's rows in batches with all its columns or with `columns`, those of its folders included."""
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
    is_number = name in _NUMBER_COLUMNS and re.fullmatch(r"-?\d{1,18}", value)
    return pa.scalar(int(value)) if is_number else pa.scalar(value)


def _check_schema(schema: pa.Schema) -> None:
    """Raise ValueError if these are no columns of a manifest."""
    names = schema.names
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has two columns of the name {twice[0]!r}, in the file or as a folder 'name=value'")
    for name in ("concept_id", "images"):
        if name not in names:
            raise ValueError(f"it has no column {name!r}; it has {', '.join(names)}")
    check_names(names, UNDERSTOOD)
    for name in _LIST_COLUMNS:
        if name in names and not _can_hold_texts(schema.field(name).type, name):
            raise ValueError(f"column {name!r} is {schema.field(name).type}; it must be a list of strings")


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
