"""Files of prompts: text with one prompt a line, or a table (Parquet, CSV, JSON), as rows with their locations.

The meaning of the cells is in `prompt_table`.
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa

from pipeline.inputs.cells import check_names, rows, short_repr
from pipeline.inputs.manifest_files import batches
from pipeline.inputs.text_tables import Row, is_text_table, numbered_thing, read_text, table_rows
from pipeline.store.addresses import find_files
from pipeline.store.redact import redact
from textual_inversion.errors import BadInput

COLUMNS = ("prompt", "negative_prompt", "concept_id", "category", "seed", "guidance_scale", "steps", "width", "height")
"""Columns that mean something here; all others are carried to the pictures' metadata."""

_OTHER_NAMES = {
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_inference_steps": "steps",
}
"""Names of the same columns in other tools, by which they are refused."""


def prompt_files(uri: str) -> list[str]:
    """Return the file, or the Parquet files of a folder or glob."""
    is_file = posixpath.splitext(uri)[1] and not any(letter in uri for letter in "*?[")
    if is_file or uri.startswith(("http://", "https://")):
        return [uri]
    return find_files(uri, ".parquet") or [uri]


def prompt_rows(file: str) -> Iterator[tuple[str, Row]]:
    """Yield a file's rows with their locations. Raises ValueError naming the file if it is no file of prompts."""
    name = f"prompts {redact(file)}"
    reader, unit = _reader(file)
    try:
        for number, row in reader(file):
            yield f"{name}, {unit} {number}", row
    except (OSError, UnicodeError, csv.Error, json.JSONDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {redact(str(error))}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _reader(file: str) -> tuple[Callable[[str], Iterator[tuple[int, Row]]], str]:
    """Return the function that yields a file's rows with their numbers, and what is numbered."""
    if is_text_table(file):
        return partial(table_rows, check_columns=_check_columns, text_column="prompt"), numbered_thing(file)
    is_parquet = posixpath.splitext(file)[1].lower() == ".parquet"
    return (_parquet, "row") if is_parquet else (_lines, "line")


def _lines(file: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(read_text(file).splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            mistake = BadInput(f"{short_repr(text)} is JSON; name the file .jsonl") if _is_json(text) else None
            yield number, mistake or {"prompt": text}


def _is_json(line: str) -> bool:
    """Return True for a JSON object or list, but not for `{}`, which is a prompt."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict | list) and bool(value)


def _parquet(file: str) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in batches(file):
        _check_columns(batch.schema.names)
        for number, row in enumerate(rows(batch, COLUMNS), number + 1):  # noqa: B020
            yield number, row


def _check_columns(names: Sequence[str]) -> None:
    """Raise ValueError if these are no columns of a table of prompts."""
    if len(set(names)) < len(names):
        raise ValueError(f"it has two columns of the name {next(name for name in names if names.count(name) > 1)!r}")
    for name in names:
        meant = _OTHER_NAMES.get(name)
        if meant and meant not in names:
            raise ValueError(f"column {name!r} is not known; did you mean {meant!r}?")
    check_names(names, COLUMNS)
    if "prompt" not in names:
        raise ValueError(f"it has no column 'prompt'; it has {', '.join(names)}")
