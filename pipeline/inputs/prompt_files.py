"""Files of prompts: text with one prompt a line, or a table (Parquet, CSV, JSON), as rows with their locations.

The meaning of the cells is in `prompt_table`.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.inputs.cells import check_names, rows, short_repr
from pipeline.inputs.manifest_files import batches
from pipeline.store.addresses import find_files, read_bytes
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

Row = Mapping[str, Any] | BadInput
"""Cells of a table's row by column; an empty cell is None."""


def prompt_files(uri: str) -> list[str]:
    """Return the file, or the Parquet files of a folder or glob."""
    is_file = posixpath.splitext(uri)[1] and not any(letter in uri for letter in "*?[")
    if is_file or uri.startswith(("http://", "https://")):
        return [uri]
    return find_files(uri, ".parquet") or [uri]


def prompt_rows(file: str) -> Iterator[tuple[str, Row]]:
    """Yield a file's rows with their locations. Raises ValueError naming the file if it is no file of prompts."""
    reader, unit = _READERS.get(posixpath.splitext(file)[1].lower(), (_lines, "line"))
    name = f"prompts {redact(file)}"
    try:
        for number, row in reader(file):
            yield f"{name}, {unit} {number}", row
    except (OSError, UnicodeError, csv.Error, json.JSONDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {redact(str(error))}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _lines(file: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
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


def _delimited(delimiter: str, file: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table as text. Every cell is text; an empty one is None."""
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    _check_columns(reader.fieldnames or [])
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            yield number, BadInput(f"it does not have {len(reader.fieldnames or [])} cells, as the header has")
        else:
            yield number, {name: cell or None for name, cell in row.items()}


def _json_lines(file: str) -> Iterator[tuple[int, Row]]:
    lines = enumerate(_text(file).split("\n"), 1)
    yield from _json_rows([(number, _json_value(line)) for number, line in lines if line.strip()])


def _json_value(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except ValueError as error:
        return BadInput(f"{short_repr(line)} is no JSON object: {error}")


def _json_list(file: str) -> Iterator[tuple[int, Row]]:
    values = json.loads(_text(file), object_pairs_hook=_object)
    if not isinstance(values, list):
        raise ValueError("it must be a list of objects with a prompt each; with an object a line, name the file .jsonl")
    yield from _json_rows(list(enumerate(values, 1)))


def _json_rows(values: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, Row]]:
    """Yield objects, and texts as prompts."""
    objects = [(number, {"prompt": value} if isinstance(value, str) else value) for number, value in values]
    names = dict.fromkeys(name for _, value in objects if isinstance(value, dict) for name in value)
    if names:
        _check_columns(list(names))
    for number, value in objects:
        if not isinstance(value, dict | BadInput):
            yield number, BadInput(f"{short_repr(value)} is neither an object nor a text")
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


_READERS: Mapping[str, tuple[Callable[[str], Iterator[tuple[int, Row]]], str]] = {
    ".parquet": (_parquet, "row"),
    ".csv": (lambda file: _delimited(",", file), "row"),
    ".tsv": (lambda file: _delimited("\t", file), "row"),
    ".json": (_json_list, "row"),
    ".jsonl": (_json_lines, "line"),
    ".ndjson": (_json_lines, "line"),
}
"""Ending of a file -> the function that yields its rows with their numbers, and what is numbered."""


def _text(file: str) -> str:
    return read_bytes(file).decode("utf-8-sig")


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
