"""Read a manifest: Parquet, one row a concept, streamed in batches and checked row by row.

manifests/README.md describes the schema. A bad row is yielded as a BadRow with its number and never stops the others;
a manifest that cannot be read at all (no such file, no such column) raises ValueError before any row is read.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.addresses import absolute, find_files, open_for_reading, resolve
from pipeline.store.parquet import iter_batches
from pipeline.store.redact import redact, redacted
from textual_inversion.concept import Concept, whole_word_pattern
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

MAX_IMAGES = 1000
"""Largest number of photos of one concept."""

MAX_CARRIED_BYTES = 64 * 2**10
"""Largest size of one row's carried columns as JSON."""

MAX_VECTORS = 512
"""Largest number of vectors: more fit no text encoder's prompt. A model's tokenizer sets its own limit later."""

MAX_CHARACTERS = {
    "placeholder": 200,
    "initializer": 1000,
    "captions": 4000,
    "images": 4000,
    "masks": 4000,
    "start_from": 4000,
}
"""Longest text in each column, in characters."""

_LIST_COLUMNS = ("images", "masks", "captions")
_MAX_REASON_CHARACTERS = 1000
_BATCH_ROWS = 1024
_CONCEPT_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """Row that describes a concept."""

    file: str
    """Address of the row's file, with credentials redacted."""
    row: int
    """Row number within the file, from 1."""
    concept: Concept
    """Concept of the row, its images and masks as absolute addresses."""
    carried: Mapping[str, Any]
    """Values of all other columns, as JSON values; they reappear in the results."""
    priority: int = 0
    """Priority from 0 to 9: higher ones are learned first. The column is carried, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """Row that describes no concept."""

    file: str
    """Address of the row's file, with credentials redacted."""
    row: int
    """Row number within the file, from 1."""
    concept_id: str | None
    """Id as far as it could be read."""
    reason: str
    """Error that names the column and the value, in one line."""


def count_rows(uri: str) -> int:
    """Count the manifest's rows from the files' footers alone."""
    return sum(_read_schema(file)[1] for file in _manifest_files(uri))


def concept_ids(uri: str) -> Iterator[str]:
    """Yield the ids of all rows, good or bad, reading that one column. Raises ValueError if it is no manifest."""
    for file in _manifest_files(uri):
        _read_schema(file)
        for batch in _batches(file, ["concept_id"]):
            ids = (row["concept_id"] for row in _rows(batch) if isinstance(row, dict))
            yield from (str(value) for value in ids if value is not None)


def read_by_priority(uri: str) -> Iterator[ManifestRow | BadRow]:
    """Yield every row as `read_manifest` does, ordered by priority, highest first; bad rows come with the first.

    The files are read once for each priority that occurs, so that memory stays at one batch.
    """
    for index, priority in enumerate(_priorities(uri)):
        for row in read_manifest(uri):
            is_due = row.priority == priority if isinstance(row, ManifestRow) else index == 0
            if is_due:
                yield row


def _priorities(uri: str) -> list[int]:
    """Return the priorities that occur, highest first, reading that one column."""
    found = {0}
    for file in _manifest_files(uri):
        if PRIORITY not in _read_schema(file)[0].names:
            continue
        try:
            for batch in _batches(file, [PRIORITY]):
                for value in batch.column(0).unique().to_pylist():
                    found |= {priority for priority in range(10) if value == priority}
        except (pa.ArrowException, OSError):  # the rows before the damage may have any priority
            found |= set(range(10))
    return sorted(found, reverse=True)


def short_hash(concept_id: str) -> bytes:
    """Return a hash of a concept id in eight bytes, because the hashes of a whole manifest are held in memory."""
    return hashlib.blake2b(concept_id.encode(), digest_size=8).digest()


def read_manifest(uri: str) -> Iterator[ManifestRow | BadRow]:
    """Yield every row of every file, in the order of the files' names; `uri` is a file, a folder or a glob.

    Memory stays at one batch plus 8 bytes and a set entry per concept id, for finding duplicates. Raises ValueError
    before the first row if any file is no manifest.
    """
    files = _manifest_files(uri)
    for file in files:
        _read_schema(file)  # of all files before the first row: a run must not fail hours later at its last file
    seen: set[int] = set()
    for file in files:
        for row in _read_file(file):
            if isinstance(row, ManifestRow):
                key = int.from_bytes(short_hash(row.concept.concept_id), "big")
                if key in seen:
                    concept_id = row.concept.concept_id
                    reason = f"concept_id {concept_id!r} occurs in an earlier row"
                    yield BadRow(file=row.file, row=row.row, concept_id=concept_id, reason=reason)
                    continue
                seen.add(key)
            yield row


def _manifest_files(uri: str) -> list[str]:
    files = find_files(absolute(uri), ".parquet")
    if not files:
        raise ValueError(f"no manifest at {redact(uri)}: give a Parquet file, a folder with *.parquet files, or a glob")
    return files


def _read_schema(file: str) -> tuple[pa.Schema, int]:
    """Return the schema and the row count of a manifest file. Raises ValueError if it is no manifest."""
    try:
        with open_for_reading(file) as handle:
            footer = pq.read_metadata(handle)
            schema = footer.schema.to_arrow_schema()
            rows = footer.num_rows
    except FileNotFoundError as error:
        raise ValueError(f"manifest {redact(file)} is not there any more") from error
    except Exception as error:  # on damaged files Arrow raises nearly everything
        raise ValueError(f"manifest {redact(file)} cannot be read as Parquet: {redact(str(error))}") from error
    file = redact(file)
    names = schema.names
    if len(set(names)) != len(names):
        raise ValueError(f"manifest {file} has two columns of the same name: {sorted(names)}")
    for name in ("concept_id", "images"):
        if name not in names:
            raise ValueError(f"manifest {file} has no column {name!r}; it has {', '.join(names)}")
    for name in _LIST_COLUMNS:
        if name in names and not _can_hold_texts(schema.field(name).type, name):
            raise ValueError(
                f"manifest {file}: column {name!r} is {schema.field(name).type}; it must be a list of strings"
            )
    return schema, rows


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


def _read_file(file: str) -> Iterator[ManifestRow | BadRow]:
    number = 0
    try:
        for batch in _batches(file):
            for values in _rows(batch):
                number += 1
                yield _parse(file, number, values)
    except (pa.ArrowException, OSError) as error:
        reason = f"the file cannot be read from this row on: {redact(str(error))}"
        yield BadRow(file=redact(file), row=number + 1, concept_id=None, reason=reason)


def _batches(file: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    with open_for_reading(file) as handle:
        yield from iter_batches(handle, columns, _BATCH_ROWS)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadInput]:
    """Yield each row as a dictionary, or as an error that names the column whose value Python cannot hold (text that is
    not UTF-8, a date beyond the year 9999)."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        rows = [_row_values(batch, index) for index in range(batch.num_rows)]
    yield from rows


def _row_values(batch: pa.RecordBatch, index: int) -> dict[str, Any] | BadInput:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            return BadInput(f"column {name!r} holds a value that cannot be read: {error}")
    return values


def _parse(file: str, number: int, values: dict[str, Any] | BadInput) -> ManifestRow | BadRow:
    concept_id = None if isinstance(values, BadInput) else values["concept_id"]
    try:
        if isinstance(values, BadInput):
            raise values
        concept = _concept(file, values)
        carried = {name: redacted(_jsonable(value)) for name, value in values.items() if name not in CONCEPT_COLUMNS}
        size = len(json.dumps(carried))
        if size > MAX_CARRIED_BYTES:
            raise BadInput(f"its other columns hold {size:,} bytes, more than {MAX_CARRIED_BYTES:,}; drop large ones")
        priority = _whole_number(values, PRIORITY, 0, most=9)
        if priority < 0:
            raise BadInput(f"priority is {priority}; it must be from 0 to 9")
    except BadInput as error:
        shown_id = _printable(str(concept_id)) if isinstance(concept_id, str | int) else None
        reason = redact(str(error))
        if len(reason) > _MAX_REASON_CHARACTERS:
            reason = f"{reason[:_MAX_REASON_CHARACTERS]} ..."
        return BadRow(file=redact(file), row=number, concept_id=shown_id, reason=reason)
    return ManifestRow(file=redact(file), row=number, concept=concept, carried=carried, priority=priority)


def _concept(file: str, values: dict[str, Any]) -> Concept:
    concept_id = values["concept_id"]
    if isinstance(concept_id, int) and not isinstance(concept_id, bool):
        concept_id = str(concept_id)  # catalogs number their items
    if not isinstance(concept_id, str) or not _CONCEPT_ID.fullmatch(concept_id):
        raise BadInput(
            f"concept_id {_short_repr(concept_id)} must be 1 to 128 letters, digits, '.', '_' or '-', not beginning "
            "with '.'; it names a folder"
        )
    images = _addresses(file, values, "images")
    if len(images) > MAX_IMAGES:
        raise BadInput(f"{len(images):,} images, more than {MAX_IMAGES:,}")
    placeholder = _text(values, "placeholder", f"<{concept_id}>")
    return Concept(
        concept_id=concept_id,
        placeholder_token=placeholder,
        images=images,
        initializer=_text(values, "initializer", ""),
        category=_text(values, "category", "object"),  # type: ignore[arg-type]  # Concept checks the value
        num_vectors=_whole_number(values, "num_vectors", 1, most=MAX_VECTORS),
        masks=_addresses(file, values, "masks"),
        captions=_captions(values, placeholder),
        start_from=_address(file, _text(values, "start_from", "")),
    )


def _addresses(file: str, values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a column's addresses, made absolute from the manifest file's folder."""
    addresses = values.get(name) or []
    if not all(isinstance(address, str) and address.strip() for address in addresses):
        raise BadInput(f"{name} holds an empty or missing address")
    for address in addresses:
        _check_text(name, address)
    return tuple(_address(file, address) for address in addresses)


def _address(file: str, address: str) -> str:
    """Return an address, made absolute from the manifest file's folder; an empty one as it is."""
    try:
        return resolve(address, relative_to=file) if address else ""
    except ValueError as error:
        raise BadInput(str(error)) from error


def _captions(values: Mapping[str, Any], placeholder: str) -> tuple[str, ...]:
    """Return the captions with `{}` in place of the concept, also where the placeholder was written out."""
    captions = values.get("captions") or []
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise BadInput("captions holds an empty or missing text")
    for caption in captions:
        _check_text("captions", caption)
    return tuple(re.sub(whole_word_pattern(placeholder), "{}", caption.strip()) for caption in captions)


def _text(values: Mapping[str, Any], name: str, default: str) -> str:
    value = values.get(name)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise BadInput(f"{name} is {_short_repr(value)}; it must be text")
    value = value.strip()
    if name != "category":
        _check_text(name, value)
        if "{}" in value:
            raise BadInput(f"{name} {value!r} holds {{}}, which is the concept's place in a prompt; leave it out")
    return value or default


def _check_text(name: str, value: str) -> None:
    """Raise BadInput for control characters (tabs, line ends, terminal commands) and for too long a text."""
    limit = MAX_CHARACTERS[name]
    if len(value) > limit:
        raise BadInput(f"{name} has {len(value):,} characters, more than {limit:,}: {_short_repr(value)}")
    if found := _CONTROL.search(value):
        raise BadInput(f"{name} {_short_repr(value)} holds a control character ({found[0]!r}); take it out")


def _short_repr(value: Any) -> str:
    """Return Python's representation of a value, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _printable(text: str) -> str:
    """Return a text that is safe to print in a terminal or on a page."""
    return text if text.isprintable() and len(text) <= 200 else _short_repr(text)


def _whole_number(values: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = values.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes missing integers as NaN
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise BadInput(f"{name} is {_short_repr(value)}; it must be a whole number")
    if value > most:
        raise BadInput(f"{name} is {value}; it must be at most {most}")
    return int(value)


def _jsonable(value: Any) -> Any:
    """Convert Arrow's Python values to JSON values: times to ISO 8601 text, decimals to text, bytes to base64, NaN to
    null. Raises BadInput for any other type."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise BadInput(f"a value of type {type(value).__name__} cannot be carried to the results; drop its column")
