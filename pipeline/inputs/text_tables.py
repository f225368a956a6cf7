"""Tables in text files: CSV, TSV, JSON and JSON lines, as rows with their numbers.

What the cells mean is in `manifest_files`, for manifests, and in `prompt_table`, for prompts.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.inputs.cells import short_repr
from pipeline.store.addresses import read_bytes
from textual_inversion.errors import BadInput

Row = Mapping[str, Any] | BadInput
"""Cells of a table's row by column; an empty cell is None."""

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
"""Endings of text files that hold a table."""

CheckColumns = Callable[[Sequence[str]], None]
"""Function that raises ValueError for names that are no columns of the wanted table."""


def is_text_table(file: str) -> bool:
    """Return whether a file's name ends as that of a table in text does."""
    return _suffix(file) in SUFFIXES


def numbered_thing(file: str) -> str:
    """Return what the numbers of a file's rows count: `line` in JSON lines, `row` in other tables."""
    return "line" if _suffix(file) in (".jsonl", ".ndjson") else "row"


def table_rows(file: str, check_columns: CheckColumns, text_column: str = "") -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table with their numbers, after `check_columns` has seen the names of all columns.

    Cells of CSV and TSV are text. `text_column` is the column of a JSON value that is a plain text; without one, such
    a value is a row's error. Raises OSError if the file cannot be read, and ValueError if it is no such table
    (UnicodeError, csv.Error and json.JSONDecodeError included).
    """
    suffix = _suffix(file)
    text = read_text(file)
    if suffix in (".csv", ".tsv"):
        return _delimited(text, "," if suffix == ".csv" else "\t", check_columns)
    values = _json_list(text) if suffix == ".json" else _json_lines(text)
    return _json_rows(values, check_columns, text_column)


def read_text(file: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark."""
    return read_bytes(file).decode("utf-8-sig")


def _suffix(file: str) -> str:
    path = file.partition("?")[0] if file.startswith(("http://", "https://")) else file
    return posixpath.splitext(path)[1].lower()


def _delimited(text: str, delimiter: str, check_columns: CheckColumns) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table with a header. Every cell is text; an empty one is None."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    check_columns(reader.fieldnames or [])
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            yield number, BadInput(f"it does not have {len(reader.fieldnames or [])} cells, as the header has")
        else:
            yield number, {name: cell or None for name, cell in row.items()}


def _json_lines(text: str) -> list[tuple[int, Any]]:
    return [(number, _json_value(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_value(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except ValueError as error:
        return BadInput(f"{short_repr(line)} is no JSON object: {error}")


def _json_list(text: str) -> list[tuple[int, Any]]:
    values = json.loads(text, object_pairs_hook=_object)
    if not isinstance(values, list):
        raise ValueError("it must be a list of objects, one a row; with an object a line, name the file .jsonl")
    return list(enumerate(values, 1))


def _json_rows(
    values: Sequence[tuple[int, Any]], check_columns: CheckColumns, text_column: str
) -> Iterator[tuple[int, Row]]:
    """Yield objects, and texts as objects with the column `text_column`."""
    is_text = {number for number, value in values if text_column and isinstance(value, str)}
    objects = [(number, {text_column: value} if number in is_text else value) for number, value in values]
    names = dict.fromkeys(name for _, value in objects if isinstance(value, dict) for name in value)
    if names:
        check_columns(list(names))
    for number, value in objects:
        if not isinstance(value, dict | BadInput):
            reason = "is neither an object nor a text" if text_column else "is no object"
            yield number, BadInput(f"{short_repr(value)} {reason}")
        elif isinstance(value, dict) and not _is_unicode(value):
            yield number, BadInput(f"{short_repr(value)} holds half of a surrogate pair, which is no character")
        else:
            yield number, value


def _is_unicode(value: Mapping[str, Any]) -> bool:
    """Return False for texts that cannot be written, as JSON's escapes can make them."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a name that occurs twice, of which Python would drop one."""
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return dict(pairs)
