"""Read a manifest, one row a concept, row by row, each of them checked.

manifests/README.md describes the schema. A bad row is yielded as a BadRow with its number and never stops the others;
a manifest that cannot be read at all (no such file, no such column) raises ValueError before any row is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.inputs.cells import check_text, id_text, jsonable, printable, short_repr, whole_number
from pipeline.inputs.manifest_files import CONCEPT_COLUMNS, PRIORITY, file_facts, file_rows, manifest_files
from pipeline.store.addresses import resolve
from pipeline.store.redact import redact, redacted
from textual_inversion.concept import Concept, whole_word_pattern
from textual_inversion.errors import BadInput

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

_MAX_REASON_CHARACTERS = 1000
_PANDAS_ROW_NUMBERS = re.compile(r"__index_level_\d+__")
_CONCEPT_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")


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
    carried_json: bytes
    """JSON text of `carried`."""
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
    content: str = ""
    """Digest of the row's values, wherever the row is; empty if they could not be read."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Values of the columns that are carried, as far as they could be read, so that results can be joined by them."""


def count_rows(uri: str) -> int:
    """Count the manifest's rows, of Parquet from the files' footers alone."""
    return sum(file_facts(file).num_rows for file in manifest_files(uri))


def manifest_notes(uri: str) -> list[str]:
    """Return remarks on the columns or on the folder of photos, each once. Raises ValueError if it is no manifest."""
    return list(dict.fromkeys(note for file in manifest_files(uri) for note in file_facts(file).notes))


def concept_ids(uri: str) -> Iterator[str]:
    """Yield the ids of all rows, good or bad, reading that one column. Raises ValueError if it is no manifest."""
    for file in manifest_files(uri):
        file_facts(file)
        ids = (row["concept_id"] for row in file_rows(file, ["concept_id"]) if isinstance(row, dict))
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
    for file in manifest_files(uri):
        if PRIORITY not in file_facts(file).names:
            continue
        try:
            for row in file_rows(file, [PRIORITY]):
                if isinstance(row, dict):
                    found |= {priority for priority in range(10) if row[PRIORITY] == priority}
        except (pa.ArrowException, OSError):  # the rows before the damage may have any priority
            found |= set(range(10))
    return sorted(found, reverse=True)


def short_hash(concept_id: str) -> bytes:
    """Return a hash of a concept id in eight bytes, because the hashes of a whole manifest are held in memory."""
    return hashlib.blake2b(concept_id.encode(), digest_size=8).digest()


@lru_cache(1024)
def is_carried(name: str) -> bool:
    """Return whether a column is carried through to the results: one that means nothing here, other than the row
    numbers that pandas writes for a table that was filtered."""
    return name not in CONCEPT_COLUMNS and not _PANDAS_ROW_NUMBERS.fullmatch(name)


def content_digest(values: Mapping[str, Any] | Concept) -> str:
    """Return a digest of a row's values, 16 hex digits."""
    return hashlib.blake2b(repr(values).encode("utf-8", "replace"), digest_size=8).hexdigest()


def read_manifest(uri: str) -> Iterator[ManifestRow | BadRow]:
    """Yield every row of every file, in the order of the files' names; `uri` is a file, a folder or a glob.

    Memory stays at one batch plus 8 bytes and a set entry per concept id, for finding duplicates. Raises ValueError
    before the first row if any file is no manifest.
    """
    files = manifest_files(uri)
    for file in files:
        file_facts(file)  # of all files before the first row: a run must not fail hours later at its last file
    seen: set[int] = set()
    for file in files:
        for row in _read_file(file):
            if isinstance(row, ManifestRow):
                key = int.from_bytes(short_hash(row.concept.concept_id), "big")
                if key in seen:
                    yield bad_row(row, f"concept_id {row.concept.concept_id!r} occurs in an earlier row")
                    continue
                seen.add(key)
            yield row


def bad_row(row: ManifestRow, reason: str) -> BadRow:
    """Return a row that could be read as one that cannot be learned."""
    content = content_digest(row.concept)
    concept_id = row.concept.concept_id
    return BadRow(
        file=row.file, row=row.row, concept_id=concept_id, reason=reason, content=content, carried=row.carried
    )


def _read_file(file: str) -> Iterator[ManifestRow | BadRow]:
    number = 0
    shown_file = redact(file)
    try:
        for values in file_rows(file):
            number += 1
            yield _parse(file, shown_file, number, values)
    except (pa.ArrowException, OSError) as error:
        reason = f"the file cannot be read from this row on: {redact(str(error))}"
        yield BadRow(file=shown_file, row=number + 1, concept_id=None, reason=reason)


def _parse(file: str, shown_file: str, number: int, values: dict[str, Any] | BadInput) -> ManifestRow | BadRow:
    carried: dict[str, Any] = {}
    try:
        if isinstance(values, BadInput):
            raise values
        carried, carried_json = _carried(values)
        concept = _concept(file, values)
        priority = whole_number(values, PRIORITY, 0, most=9)
        if priority < 0:
            raise BadInput(f"priority is {priority}; it must be from 0 to 9")
    except BadInput as error:
        concept_id = None if isinstance(values, BadInput) else id_text(values["concept_id"])
        shown_id = printable(str(concept_id)) if isinstance(concept_id, str | int) else None
        reason = redact(str(error))
        if len(reason) > _MAX_REASON_CHARACTERS:
            reason = f"{reason[:_MAX_REASON_CHARACTERS]} ..."
        content = "" if isinstance(values, BadInput) else content_digest(values)
        return BadRow(file=shown_file, row=number, concept_id=shown_id, reason=reason, content=content, carried=carried)
    return ManifestRow(
        file=shown_file, row=number, concept=concept, carried=carried, carried_json=carried_json, priority=priority
    )


def _carried(values: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return the values of the columns that are carried, as JSON values and as JSON text; raises BadInput if they are
    too large."""
    carried = {name: redacted(jsonable(value)) for name, value in values.items() if is_carried(name)}
    text = json.dumps(carried).encode()
    if len(text) > MAX_CARRIED_BYTES:
        raise BadInput(f"its other columns hold {len(text):,} bytes, more than {MAX_CARRIED_BYTES:,}; drop large ones")
    return carried, text


def _concept(file: str, values: dict[str, Any]) -> Concept:
    concept_id = id_text(values["concept_id"])  # catalogs number their items
    if not isinstance(concept_id, str) or not _CONCEPT_ID.fullmatch(concept_id):
        raise BadInput(
            f"concept_id {short_repr(concept_id)} must be 1 to 128 letters, digits, '.', '_' or '-', not beginning "
            "with '.'; it names a folder"
        )
    images = _addresses(file, values, "images")
    if not images:
        raise BadInput(f"concept {concept_id!r} has no images; give it 3 to 5 photos")
    if len(images) > MAX_IMAGES:
        raise BadInput(f"{len(images):,} images, more than {MAX_IMAGES:,}")
    placeholder = _text(values, "placeholder", f"<{concept_id}>")
    return Concept(
        concept_id=concept_id,
        placeholder_token=placeholder,
        images=images,
        initializer=_text(values, "initializer", ""),
        category=_text(values, "category", "object"),  # type: ignore[arg-type]  # Concept checks the value
        num_vectors=whole_number(values, "num_vectors", 1, most=MAX_VECTORS),
        masks=_addresses(file, values, "masks"),
        captions=_captions(values, placeholder),
        start_from=_address(file, _text(values, "start_from", "")),
    )


def _addresses(file: str, values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a column's addresses, made absolute from the manifest file's folder."""
    found = []
    for address in values.get(name) or ():
        if not isinstance(address, str) or not address.strip():
            raise BadInput(f"{name} holds an empty or missing address")
        check_text(name, address, MAX_CHARACTERS[name])
        found.append(_address(file, address))
    return tuple(found)


def _address(file: str, address: str) -> str:
    """Return an address, made absolute from the manifest file's folder; an empty one as it is."""
    try:
        return resolve(address, relative_to=file) if address else ""
    except ValueError as error:
        raise BadInput(str(error)) from error


def _captions(values: Mapping[str, Any], placeholder: str) -> tuple[str, ...]:
    """Return the captions with `{}` in place of the concept, also where the placeholder was written out."""
    captions = values.get("captions") or ()
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise BadInput("captions holds an empty or missing text")
        check_text("captions", caption, MAX_CHARACTERS["captions"])
        _refuse_credentials("captions", caption)
    return tuple(re.sub(whole_word_pattern(placeholder), "{}", caption.strip()) for caption in captions)


def _text(values: Mapping[str, Any], name: str, default: str) -> str:
    value = values.get(name)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise BadInput(f"{name} is {short_repr(value)}; it must be text")
    value = value.strip()
    if name != "category":
        check_text(name, value, MAX_CHARACTERS[name])
        if name != "start_from":  # an address, which is hidden wherever it is shown
            _refuse_credentials(name, value)
        if "{}" in value:
            raise BadInput(f"{name} {value!r} holds {{}}, which is the concept's place in a prompt; leave it out")
    return value or default


def _refuse_credentials(name: str, text: str) -> None:
    """Raise BadInput for a text that models and people read, with an address in it that is not to be shown."""
    if (shown := redact(text)) != text:
        raise BadInput(f"{name} {shown!r} holds an address with credentials, which records and results would show")
