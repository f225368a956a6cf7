"""Read a manifest: Parquet, one row a concept, streamed in batches and checked row by row.

The schema in words is in manifests/README.md. A bad row is handed on as a BadRow with its number and never stops the
others; a manifest that cannot be one at all (no such file, no such column) raises ValueError before any row is read.
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
from pipeline.store.redact import redact, redacted
from textual_inversion.concept import Concept, whole_word_pattern
from textual_inversion.errors import BadInput

CONCEPT_COLUMNS = (
    "concept_id", "images", "placeholder", "initializer", "category", "num_vectors", "masks", "captions"
)  # fmt: skip
PRIORITY = "priority"
_LIST_COLUMNS = ("images", "masks", "captions")
MAX_IMAGES = 1000
MAX_CARRIED_BYTES = 64 * 2**10
MAX_VECTORS = 512
"""More fit no text encoder's prompt; how many fit a model's, its tokenizer says."""
MAX_CHARACTERS = {"placeholder": 200, "initializer": 1000, "captions": 4000, "images": 4000, "masks": 4000}
_MAX_REASON = 1000
_BATCH_ROWS = 1024
_CONCEPT_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """A row that describes a concept."""

    file: str
    """Its address, as it may be shown."""
    row: int
    """Counted from 1 within the file."""
    concept: Concept
    """Its images and masks are absolute addresses."""
    carried: Mapping[str, Any]
    """All other columns, as JSON values; they reappear in the results."""
    priority: int = 0
    """0 to 9: those with more are learned first. A carried column, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that does not, and why."""

    file: str
    row: int
    concept_id: str | None
    reason: str


def count_rows(uri: str) -> int:
    """Rows in the manifest, from the files' footers alone."""
    return sum(_open(file)[1] for file in _files(uri))


def concept_ids(uri: str) -> Iterator[str]:
    """The ids in a manifest's rows, good or bad, from that one column; ValueError if it cannot be a manifest."""
    for file in _files(absolute(uri)):
        _open(file)
        with open_for_reading(file) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(_BATCH_ROWS, columns=["concept_id"], use_threads=False):
                ids = (row["concept_id"] for row in _values(batch) if isinstance(row, dict))
                yield from (str(value) for value in ids if value is not None)


def read_by_priority(uri: str) -> Iterator[ManifestRow | BadRow]:
    """As `read_manifest`, rows of the highest priority first; bad ones come with those.

    The files are read once for each priority that occurs, so that no more is held than of one batch.
    """
    for number, level in enumerate(_priorities(uri)):
        for row in read_manifest(uri):
            if row.priority == level if isinstance(row, ManifestRow) else number == 0:
                yield row


def _priorities(uri: str) -> list[int]:
    """Those that occur, the highest first, from that column alone."""
    found = {0}
    for file in _files(absolute(uri)):
        if PRIORITY not in _open(file)[0].names:
            continue
        try:
            with open_for_reading(file) as handle:
                for batch in pq.ParquetFile(handle).iter_batches(columns=[PRIORITY], use_threads=False):
                    for value in batch.column(0).unique().to_pylist():
                        found |= {level for level in range(10) if value == level}
        except (pa.ArrowException, OSError):  # the rows before the damage may have any
            found |= set(range(10))
    return sorted(found, reverse=True)


def read_manifest(uri: str) -> Iterator[ManifestRow | BadRow]:
    """Every row of every file, in the order of the files' names; a file, a folder or a glob at any fsspec URI.

    Memory stays at one batch plus 8 bytes and a set entry per concept id, by which later duplicates are told.
    """
    files = _files(absolute(uri))
    for file in files:
        _open(file)  # all files, before the first row: a wrong column is found now, not at three in the morning
    seen: set[int] = set()
    for file in files:
        for row in _read_file(file):
            if isinstance(row, ManifestRow):
                digest = hashlib.blake2b(row.concept.concept_id.encode(), digest_size=8).digest()
                key = int.from_bytes(digest, "big")
                if key in seen:
                    yield BadRow(file=row.file, row=row.row, concept_id=row.concept.concept_id,
                                 reason=f"concept_id {row.concept.concept_id!r} occurs in an earlier row")  # fmt: skip
                    continue
                seen.add(key)
            yield row


def _files(uri: str) -> list[str]:
    files = find_files(absolute(uri), ".parquet")
    if not files:
        raise ValueError(f"no manifest at {redact(uri)}: give a Parquet file, a folder with *.parquet files, or a glob")
    return files


def _open(file: str) -> tuple[pa.Schema, int]:
    """Schema and row count, checked."""
    try:
        with open_for_reading(file) as handle:
            parquet = pq.ParquetFile(handle)
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except FileNotFoundError as error:
        raise ValueError(f"manifest {redact(file)} is not there any more") from error
    except Exception as error:  # on damaged files Arrow raises nearly everything
        raise ValueError(f"manifest {redact(file)} cannot be read as Parquet: {redact(str(error))}") from error
    file, names = redact(file), schema.names
    if len(set(names)) != len(names):
        raise ValueError(f"manifest {file} has two columns of the same name: {sorted(names)}")
    for name in ("concept_id", "images"):
        if name not in names:
            raise ValueError(f"manifest {file} has no column {name!r}; it has {', '.join(names)}")
    for name in _LIST_COLUMNS:
        if name in names and not _holds_texts(schema.field(name).type, name):
            raise ValueError(
                f"manifest {file}: column {name!r} is {schema.field(name).type}; it must be a list of strings"
            )
    return schema, rows


def _holds_texts(kind: pa.DataType, name: str) -> bool:
    """Whether a column can hold lists of texts; a column that is empty in every row has no type of its own."""
    if pa.types.is_null(kind):
        return name != "images"
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    item = kind.value_type
    may_be_empty = name != "images" and pa.types.is_null(item)
    return bool(
        pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_dictionary(item) or may_be_empty
    )


def _read_file(file: str) -> Iterator[ManifestRow | BadRow]:
    number = 0
    try:
        with open_for_reading(file) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(_BATCH_ROWS, use_threads=False):
                for values in _values(batch):
                    number += 1
                    yield _parse(file, number, values)
    except (pa.ArrowException, OSError) as error:
        reason = f"the file cannot be read from this row on: {redact(str(error))}"
        yield BadRow(file=redact(file), row=number + 1, concept_id=None, reason=reason)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadInput]:
    """The rows; one with a value that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) as an
    error that names its column."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        rows = [_row(batch, index) for index in range(batch.num_rows)]
    yield from rows


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | BadInput:
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
        priority = _count(values, PRIORITY, 0, most=9)
        if priority < 0:
            raise BadInput(f"priority is {priority}; it must be from 0 to 9")
    except BadInput as error:
        named = _printable(str(concept_id)) if isinstance(concept_id, str | int) else None
        reason = redact(str(error))
        if len(reason) > _MAX_REASON:
            reason = f"{reason[:_MAX_REASON]} ..."
        return BadRow(file=redact(file), row=number, concept_id=named, reason=reason)
    return ManifestRow(file=redact(file), row=number, concept=concept, carried=carried, priority=priority)


def _concept(file: str, values: dict[str, Any]) -> Concept:
    concept_id = values["concept_id"]
    if isinstance(concept_id, int) and not isinstance(concept_id, bool):
        concept_id = str(concept_id)  # catalog numbers
    if not isinstance(concept_id, str) or not _CONCEPT_ID.fullmatch(concept_id):
        raise BadInput(
            f"concept_id {_short(concept_id)} must be 1 to 128 letters, digits, '.', '_' or '-', not beginning with "
            "'.'; it names a folder"
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
        num_vectors=_count(values, "num_vectors", 1, most=MAX_VECTORS),
        masks=_addresses(file, values, "masks"),
        captions=_captions(values, placeholder),
    )


def _addresses(file: str, values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Absolute addresses from a column with relative ones."""
    addresses = values.get(name) or []
    if not all(isinstance(address, str) and address.strip() for address in addresses):
        raise BadInput(f"{name} holds an empty or missing address")
    for address in addresses:
        _check_text(name, address)
    try:
        return tuple(resolve(address, relative_to=file) for address in addresses)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _captions(values: Mapping[str, Any], placeholder: str) -> tuple[str, ...]:
    """With `{}` where the concept stands, also where the placeholder was written out."""
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
        raise BadInput(f"{name} is {_short(value)}; it must be text")
    value = value.strip()
    if name != "category":
        _check_text(name, value)
        if "{}" in value:
            raise BadInput(f"{name} {value!r} holds {{}}, which is the concept's place in a prompt; leave it out")
    return value or default


def _check_text(name: str, value: str) -> None:
    """No control characters (a tab, a line's end, a terminal's commands), and no more than anybody would write."""
    most = MAX_CHARACTERS[name]
    if len(value) > most:
        raise BadInput(f"{name} has {len(value):,} characters, more than {most:,}: {_short(value)}")
    if found := _CONTROL.search(value):
        raise BadInput(f"{name} {_short(value)} holds a control character ({found[0]!r}); take it out")


def _short(value: Any) -> str:
    """As Python writes it, within a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _printable(text: str) -> str:
    """What a terminal and a page can take."""
    return text if text.isprintable() and len(text) <= 200 else _short(text)


def _count(values: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = values.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes missing integers as NaN
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise BadInput(f"{name} is {_short(value)}; it must be a whole number")
    if value > most:
        raise BadInput(f"{name} is {value}; it must be at most {most}")
    return int(value)


def _jsonable(value: Any) -> Any:
    """Arrow's Python values as JSON ones: times become ISO 8601 text, decimals text, bytes base64, NaN null."""
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
