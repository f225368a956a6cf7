"""What became of a concept: a small JSON object, written last, from which results and report are derived."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

log = logging.getLogger(__name__)

_BATCH = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """Size and SHA-256 of an object, compared with what the store holds when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """A concept learned once, by some settings; what of it a record shows if it is kept."""

    rung: str
    """Settings it was learned with, as `gate.ladder` has them; empty for the run's own."""
    fingerprint: str
    initializer: str = ""
    start: str = ""
    attempts: int = 1
    steps: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    error: str = ""
    """Why there is nothing to keep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptRecord:
    """The final state of one concept under one fingerprint.

    Unknown keys are ignored on reading, so that older code reads newer records.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    concept_id: str
    fingerprint: str
    status: Literal["done", "failed"]
    placeholder_token: str
    initializer: str = ""
    """From the manifest, or as `init.method` 'auto' chose it."""

    start: str = ""
    """Where its rows started, in words: the method, what it chose, and why it did not."""

    category: str = "object"
    num_vectors: int = 1
    images: tuple[str, ...] = ()
    """Addresses of the photos it was learned from."""

    error: str = ""
    """Why it failed: one line, the cause first."""

    error_kind: str = ""
    """Kind of the error, one of `textual_inversion.errors.ErrorKind`; empty for finished concepts, and in records of
    before kinds were kept."""

    attempts: int = 1
    """Calls it took, those lost with a dying actor included."""

    quarantined: bool = False
    """It failed because so many of its calls were lost as `actors.max_attempts` allows, not by its own input."""

    setbacks: int = 0
    """Times its loss was not finite, and it went on from its last good state at a lower rate."""

    repeated: int = 0
    """Calls to storage that its actor made again, since the record before."""

    steps: int = 0
    seconds: float = 0.0
    """Wall time in its slot."""

    finished_at: str = ""
    """UTC, ISO 8601."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """`clip_i`, `clip_t` and the like, from the sample pictures; empty without an extractor."""

    files: Mapping[str, StoredFile] = field(default_factory=dict)
    """Name in the concept's folder -> what lies there."""

    carried: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's other columns."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What the fingerprint is the digest of (`plan.fingerprint_inputs`), so that a later change can be named; empty in
    records of before this was kept."""

    gate: str = ""
    """`passed` or `below`, as its scores were judged; empty without scores or bounds."""

    tries: tuple[Try, ...] = ()
    """Its own and those after it, if it was below the gate and learned again with other settings."""

    kept: str = ""
    """Fingerprint of the try that is kept: the files, scores and steps are of that one. Empty for its own."""

    @property
    def folder(self) -> ConceptFolder:
        """Where the record is."""
        return ConceptFolder(self.concept_id, self.fingerprint)

    @property
    def result(self) -> ConceptFolder:
        """Where the embedding, grid and curve are."""
        return ConceptFolder(self.concept_id, self.kept or self.fingerprint)


_ADAPTER = TypeAdapter(ConceptRecord)

CACHE_PATH = "records.parquet"

_CACHE_SCHEMA = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("written", pa.float64()), ("content", pa.binary())]
)


def to_json(record: ConceptRecord) -> bytes:
    return json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False).encode()


def from_json(data: bytes) -> ConceptRecord:
    """Raises ValueError naming what is missing or wrong."""
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise ValueError("not a concept record: " + "; ".join(problems)) from error


def put_record(store: RunStore, record: ConceptRecord) -> None:
    """Write it where its status says. For a finished concept this is the last write of all: it makes it done."""
    path = record.folder.record if record.status == "done" else record.folder.failure
    store.put(path, to_json(record))


def read_record(store: RunStore, folder: ConceptFolder) -> ConceptRecord:
    """The record of a finished concept; FileNotFoundError when there is none."""
    return from_json(store.get(folder.record))


def load_records(
    store: RunStore, current: Mapping[bytes, bytes] | None = None, *, remember: bool = False
) -> Iterator[ConceptRecord]:
    """The record of every concept, or a failure where there is no record: one listing, and on object stores a request
    for each that is new since they were last remembered (`remember`: when all have been given, for the next time).

    With `Plan.current`, only those of the plan, in its order and with the carried columns the manifest has now. A
    record that cannot be read is given as a failed one with the cause.
    """
    listed: dict[bytes, tuple[ConceptFolder, tuple[str, int, float]]] = {}
    for path, size, written in store.scan_with_times("concepts"):
        folder = ConceptFolder.from_path(path)
        key = folder.fingerprint.encode() if folder is not None else b""
        if folder is None or (current is not None and key not in current):
            continue
        if path == folder.record and size:
            listed[key] = folder, (path, size, written)
        elif path == folder.failure:
            listed.setdefault(key, (folder, (path, size, written)))
    known = RecordCache(store)
    found = iter([listed[key] for key in (listed if current is None else current) if key in listed])
    while batch := list(islice(found, _BATCH)):
        contents: dict[str, bytes | OSError | None] = {entry[0]: known.content(*entry) for _, entry in batch}
        contents.update(store.get_many([path for path, content in contents.items() if content is None]))
        for folder, entry in batch:
            content = contents[entry[0]]
            assert content is not None
            if remember and isinstance(content, bytes):
                known.keep(*entry, content)
            record = _read(folder, entry[0], content)
            if current is not None:
                carried = json.loads(current[folder.fingerprint.encode()])
                record = dataclasses.replace(record, carried=carried)
            yield record
    if remember:
        known.store()


def latest(records: Iterable[ConceptRecord]) -> list[ConceptRecord]:
    """One record a concept, the one finished last; for a report made without a plan."""
    newest: dict[str, ConceptRecord] = {}
    for record in records:
        before = newest.get(record.concept_id)
        if before is None or record.finished_at >= before.finished_at:
            newest[record.concept_id] = record
    return list(newest.values())


def _read(folder: ConceptFolder, path: str, content: bytes | OSError) -> ConceptRecord:
    try:
        if isinstance(content, OSError):
            raise content
        record = from_json(content)
        if record.folder != folder:
            raise ValueError(f"it is of {record.folder.root}")
    except (OSError, ValueError) as error:
        return ConceptRecord(
            concept_id=folder.concept_id,
            fingerprint=folder.fingerprint,
            status="failed",
            placeholder_token="",
            error=f"{path} cannot be read ({error}); delete it and run again",
        )
    return record


class RecordCache:
    """What was remembered, and what is to be from now on. Nothing on local disks, where a request costs nothing."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._table, self._rows = store, _CACHE_SCHEMA.empty_table(), dict[str, int]()
        self._kept: list[dict[str, object]] = []
        self._is_new = False
        if not store.is_remote:
            return
        try:
            self._table = read_table(io.BytesIO(store.get(CACHE_PATH)), _CACHE_SCHEMA.names).cast(_CACHE_SCHEMA)
        except FileNotFoundError:
            return
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is read no further: %s", store.uri(CACHE_PATH), error)
            return
        self._rows = {path: row for row, path in enumerate(self._table["path"].to_pylist())}

    def content(self, path: str, size: int, written: float) -> bytes | None:
        """Of an object as a listing shows it, if this is what was remembered."""
        row = self._rows.get(path)
        if row is None or not written:
            return None
        if (self._table["size"][row].as_py(), self._table["written"][row].as_py()) != (size, written):
            return None
        content: bytes = self._table["content"][row].as_py()
        return content

    def keep(self, path: str, size: int, written: float, content: bytes) -> None:
        """To be remembered by `store`."""
        self._is_new |= self.content(path, size, written) is None
        if self._store.is_remote and written:
            self._kept.append({"path": path, "size": size, "written": written, "content": content})

    def store(self) -> None:
        """Replace what was remembered, if it is another now. Never fails: the next run reads each record again."""
        if not self._kept or not (self._is_new or len(self._kept) != len(self._rows)):
            return
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._kept, _CACHE_SCHEMA), buffer, compression="zstd")
        try:
            self._store.put(CACHE_PATH, buffer.getvalue())
        except OSError as error:
            log.warning("%s was not stored: %s", self._store.uri(CACHE_PATH), error)
