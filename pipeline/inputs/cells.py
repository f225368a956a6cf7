"""Cells of a table: their values in Python, as JSON and in messages, and the names of their columns."""

from __future__ import annotations

import base64
import datetime
import difflib
import json
import math
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import pyarrow as pa

from textual_inversion.errors import BadInput

T = TypeVar("T")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ALIKE = 0.85
"""Share of characters in common (difflib) from which an unknown name counts as a mistyped one."""


def check_names(names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError for a column that is not known and has nearly the name of a known one that is not there.

    Any other unknown column is carried. A name that begins with a known one (`category_2`) is a name of its own.
    """
    absent = [name for name in known if name not in names]
    for name in names:
        if name in known or name.startswith(tuple(known)):
            continue
        close = difflib.get_close_matches(name.lower().replace(" ", "_"), absent, n=1, cutoff=_ALIKE)
        if close:
            raise ValueError(
                f"column {name!r} is not known; did you mean {close[0]!r}? To carry it as it is, give it a name "
                "that is less alike"
            )


def rows(batch: pa.RecordBatch, understood: Collection[str]) -> Iterator[dict[str, Any] | BadInput]:
    """Yield each row as a dictionary of Python values.

    A value that Python cannot hold is text in a column that is only carried. In a column of `understood` it makes its
    row an error that names the column (text that is not UTF-8, a date beyond the year 9999).
    """
    columns = {
        name: _values(name, column, is_understood=name in understood)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    has_errors = any(BadInput in map(type, values) for values in columns.values())
    for values in zip(*columns.values(), strict=True):
        error = has_errors and next((value for value in values if isinstance(value, BadInput)), None)
        yield error or dict(zip(columns, values, strict=True))


def _values(name: str, column: pa.Array, *, is_understood: bool) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(name, column[i : i + 1], is_understood=is_understood) for i in range(len(column))]
    return values


def _value(name: str, cell: pa.Array, *, is_understood: bool) -> Any:
    """Return the value of an array of one cell: in Python, as text, or as an error."""
    try:
        return cell[0].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if is_understood:
            return BadInput(f"column {name!r} holds a value that cannot be read: {error}")
        return _as_text(cell)


def _as_text(cell: pa.Array) -> str:
    """Return the text of an array of one cell whose value Python cannot hold: a struct's fields as JSON in their order,
    a moment in UTC, broken text with its good characters, anything else as Arrow prints it."""
    if pa.types.is_struct(cell.type):
        pairs = zip((field.name for field in cell.type), cell.flatten(), strict=True)
        values = [[name, jsonable(_value(name, each, is_understood=False))] for name, each in pairs]
        return json.dumps(values, ensure_ascii=False)
    if pa.types.is_timestamp(cell.type) and cell.type.tz:
        cell = cell.cast(pa.timestamp(cell.type.unit, "UTC"))
    return " ".join(cell.to_string().strip("[] \n").split()).removeprefix('"').removesuffix('"')


def reason_for_text(column_type: pa.DataType) -> str:
    """Return why Python cannot hold any value of a column, which is therefore carried as text; empty where it can."""
    if pa.types.is_timestamp(column_type) and column_type.tz:
        try:
            pa.lib.string_to_tzinfo(column_type.tz)
        except (ValueError, KeyError):
            return f"the time zone {column_type.tz!r} is not known here"
    fields = [column_type.field(i) for i in range(column_type.num_fields)]
    if pa.types.is_struct(column_type) and len({field.name for field in fields}) < len(fields):
        return "a field occurs twice in it"
    return next(filter(None, (reason_for_text(field.type) for field in fields)), "")


def jsonable(value: Any) -> Any:
    """Convert Arrow's Python values to JSON values: times to ISO 8601 text, decimals and UUIDs to text, bytes to
    base64, NaN to null, and values of other types to text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value)


def id_text(value: Any) -> Any:
    """Return a whole number or a UUID as the text that names a concept; any other value as it is."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, uuid.UUID) else value


def whole_number(values: Mapping[str, Any], name: str, default: T, most: int) -> int | T:
    """Return a column's whole number; `default` for an empty cell, and for NaN, as which pandas writes missing numbers.
    Raises BadInput for another value or one above `most`."""
    value = values.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise BadInput(f"{name} is {short_repr(value)}; it must be a whole number")
    if value > most:
        raise BadInput(f"{name} is {value}; it must be at most {most}")
    return int(value)


def check_text(name: str, value: str, most_characters: int) -> None:
    """Raise BadInput for control characters (tabs, line ends, terminal commands) and for too long a text."""
    if len(value) > most_characters:
        raise BadInput(f"{name} has {len(value):,} characters, more than {most_characters:,}: {short_repr(value)}")
    if found := _CONTROL.search(value):
        raise BadInput(f"{name} {short_repr(value)} holds a control character ({found[0]!r}); take it out")


def short_repr(value: Any) -> str:
    """Return Python's representation of a value, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """Return a text that is safe to print in a terminal or on a page."""
    return text if text.isprintable() and len(text) <= 200 else short_repr(text)
