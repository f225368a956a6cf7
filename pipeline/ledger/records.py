"""A concept's record: a small JSON object, written last, from which results and report are derived."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.ledger.digest import digest
from pipeline.ledger.listing import ConceptListing, Entry
from pipeline.ledger.record_cache import RecordCache
from pipeline.ledger.record_parts import PartWriter
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.errors import STORAGE

_BATCH = 500
_DAMAGED = "damaged: "

Equality = Literal["", "to rounding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """Size and SHA-256 of an object; both were compared with what the store holds when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnWith:
    """Settings of a sampler (`textual_inversion.config.SamplingConfig`)."""

    solver: str
    steps: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StripFacts:
    """Layout of the strip of previews in a concept's folder (`textual_inversion.strips`)."""

    steps: tuple[int, ...]
    """Steps of the concept at which its pictures were drawn."""
    cell_px: int
    """Side of each picture on the strip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """A try of the quality gate: a concept learned with one set of settings. The record has the same fields, with the
    values of the try that is kept."""

    rung: str
    """The entry of `gate.ladder` with the try's settings; empty for the run's own settings."""
    fingerprint: str
    initializer: str = ""
    prompt_as: str = ""
    start: str = ""
    attempts: int = 1
    steps: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    previews: StripFacts | None = None
    error: str = ""
    """The error that left this try without a result; empty if it has one."""


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
    """The manifest's word, or the one that `init.method` 'auto' chose."""

    prompt_as: str = ""
    """Text that names the concept in prompts as it was learned: the placeholder token, and with the class cue the
    initializer behind it. Empty in failures and in records of earlier releases, which drew the token alone."""

    start: str = ""
    """Start of the learned rows, in words: the method, its choice, and the reason where it fell back to another."""

    category: str = "object"
    num_vectors: int = 1
    images: tuple[str, ...] = ()
    """Addresses of the photos."""

    error: str = ""
    """The error that ended a failed concept: one line, the cause first."""

    error_kind: str = ""
    """Kind of the error, one of `textual_inversion.errors.ErrorKind`; empty for done concepts, and in records of
    releases that kept no kinds."""

    attempts: int = 1
    """Calls of actors for this concept; those lost with a dying actor count."""

    quarantined: bool = False
    """The concept failed because `actors.max_attempts` of its calls were lost, not because of its own input."""

    setbacks: int = 0
    """Times that its loss was not finite and it was rolled back to its last good state, with a lower learning rate."""

    equality: Equality = ""
    """Extent to which the files' bytes are those that the concept has alone, in any company or slot, on the same kind
    of machine. Empty: to the bit. `to rounding`: its actor ran on an accelerator whose results depend on places in a
    batch. See docs/REPRODUCIBILITY.md."""

    memory: str = ""
    """Estimated memory of its actor's passes, and the ways in which the actor saved memory, in one line. With tiles,
    photos were encoded and pictures decoded a little differently. Empty in records of earlier releases."""

    repeated: int = 0
    """Calls to storage that its actor repeated since the actor's previous record."""

    steps: int = 0
    seconds: float = 0.0
    """Wall time in a slot."""

    finished_at: str = ""
    """UTC, ISO 8601."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores of the sample pictures by name, `clip_i` and `clip_t` among them; empty without a feature extractor."""

    sampling: DrawnWith | None = None
    """Settings that its sample pictures were drawn with, the model's own in place of 0; None in failures and in records
    of releases that did not keep them."""

    files: Mapping[str, StoredFile] = field(default_factory=dict)
    """Files of the concept's folder, by name."""

    previews: StripFacts | None = None
    """The concept's strip of previews; None without one, and in records of earlier releases."""

    carried: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's other columns, as JSON values."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """The value whose digest is the fingerprint (`plan.fingerprint_inputs`), so that a later change can be named; empty
    in records of releases that did not keep it."""

    gate: str = ""
    """The gate's verdict on the scores, `passed` or `below`; empty without scores or bounds."""

    tries: tuple[Try, ...] = ()
    """The first try and those with other settings, where the concept was below the gate and was learned again."""

    kept: str = ""
    """Fingerprint of the try that is kept, whose files, scores and steps these are; empty if it is the first."""

    @property
    def name_in_prompts(self) -> str:
        """Text that `{}` stands for in the concept's prompts."""
        return self.prompt_as or self.placeholder_token

    @property
    def folder(self) -> ConceptFolder:
        """The folder of the record."""
        return ConceptFolder(self.concept_id, self.fingerprint)

    @property
    def result(self) -> ConceptFolder:
        """The folder of the embedding, grid and curve."""
        return ConceptFolder(self.concept_id, self.kept or self.fingerprint)

    def as_damaged(self, damage: str) -> ConceptRecord:
        """Return the record as one of a failed concept, whose results are not as they were written."""
        error = damage_error(damage)
        return dataclasses.replace(self, status="failed", error=error, error_kind=STORAGE)

    @property
    def is_damaged(self) -> bool:
        return self.status == "failed" and self.error.startswith(_DAMAGED)


_ADAPTER = TypeAdapter(ConceptRecord)

_FIELDS = tuple(each.name for each in dataclasses.fields(ConceptRecord))
_encode = json.JSONEncoder(allow_nan=False).encode

_DIGEST = "digest"
"""Key of the digest of all other keys, by which a record that was edited is known. Earlier releases wrote none."""


def to_json(record: ConceptRecord) -> bytes:
    """Return the JSON text of a record, a line for each field, with its digest."""
    tree = {name: getattr(record, name) for name in _FIELDS}  # `asdict` of the whole takes three times as long
    tree["files"] = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in record.files.items()}
    tree["tries"] = [dataclasses.asdict(each) for each in record.tries]
    for name in ("sampling", "previews"):
        tree[name] = dataclasses.asdict(tree[name]) if tree[name] else None
    tree[_DIGEST] = digest(tree, escape_non_ascii=True)
    return ("{" + ",".join(f"\n {_encode(name)}: {_encode(value)}" for name, value in tree.items()) + "\n}").encode()


def from_json(data: bytes) -> ConceptRecord:
    """Parse a record. Raises ValueError naming the keys that are missing or wrong, and for a record that is not as it
    was written."""
    try:
        record = _ADAPTER.validate_json(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise ValueError("not a concept record: " + "; ".join(problems)) from error
    tree = json.loads(data)
    stated = tree.pop(_DIGEST, None)
    if stated is not None and stated != digest(tree, escape_non_ascii=True):
        raise ValueError("it is not as it was written: its digest is another")
    return record


def put_record(store: RunStore, record: ConceptRecord) -> None:
    """Write a record under the name for its status. A done concept's record is its last object: it makes it done."""
    store.put(_path_of(record), to_json(record))


def add_to_part(parts: PartWriter, record: ConceptRecord) -> None:
    """Add a record that was put a moment ago to the parts, so that it need not be read again."""
    if parts.is_needed:
        parts.add_content(_path_of(record), to_json(record))


def _path_of(record: ConceptRecord) -> str:
    return record.folder.record if record.status == "done" else record.folder.failure


def read_record(store: RunStore, folder: ConceptFolder) -> ConceptRecord:
    """Read the record of a done concept. Raises FileNotFoundError if there is none."""
    return from_json(store.get(folder.record))


def load_records(
    store: RunStore, carried: Mapping[bytes, bytes] | None = None, *, update_cache: bool = False
) -> Iterator[ConceptRecord]:
    """Yield the record of every fingerprint, or its failure where there is no record.

    `carried` is `Plan.carried`: only records of its fingerprints are read then, in its order, and they get its carried
    columns. A record that cannot be read, or whose files are not there as it says, is yielded as a failed one with the
    reason.

    Makes one listing and, on object stores, one request for each record that `RecordCache` does not hold;
    `update_cache` adds these to it, the last of them after the last record.
    """
    listing = ConceptListing.of(store)
    ends = listing.failures | listing.records
    cache = RecordCache(store)
    wanted = ends.values() if carried is None else (ends[key] for key in carried if key in ends)
    for found in read_contents(store, wanted, cache):
        record = record_or_failure(found.entry.path, found.content, is_checked=found.is_checked)
        if update_cache and isinstance(found.content, bytes) and not found.is_checked and not record.is_damaged:
            cache.keep(found.entry.identity, found.content)
        record = _compare_sizes(record, listing)
        if carried is not None:
            record = dataclasses.replace(record, carried=json.loads(carried[found.entry.key]))
        yield record
    if update_cache:
        cache.store()


class Content(NamedTuple):
    """A record as it is stored."""

    entry: Entry
    content: bytes | OSError
    """Bytes of the object, or the error of reading them."""
    is_checked: bool
    """True if they are known to be a record of the entry's folder, as it was written."""


def read_contents(store: RunStore, entries: Iterable[Entry], cache: RecordCache | None = None) -> Iterator[Content]:
    """Yield the contents of records and failures, from a cache where it holds them."""
    rest = iter(entries)
    while batch := list(islice(rest, _BATCH)):
        cached = cache.contents([each.identity for each in batch]) if cache else [None] * len(batch)
        read = store.get_many(each.path for each, content in zip(batch, cached, strict=True) if content is None)
        for entry, content in zip(batch, cached, strict=True):
            yield Content(entry, read[entry.path] if content is None else content, content is not None)


def latest(records: Iterable[ConceptRecord]) -> list[ConceptRecord]:
    """Return one record a concept, the one finished last; for reports made without a plan."""
    newest: dict[str, ConceptRecord] = {}
    for record in records:
        before = newest.get(record.concept_id)
        if before is None or record.finished_at >= before.finished_at:
            newest[record.concept_id] = record
    return list(newest.values())


def record_or_failure(
    path: str, content: bytes | OSError, listing: ConceptListing | None = None, *, is_checked: bool = False
) -> ConceptRecord:
    """Return the record or failure at `path`, or a failed record that says why it cannot be read.

    With a listing, a record whose files are not there as it says is such a failure, too. is_checked: see `Content`.
    """
    folder = ConceptFolder.from_path(path)
    assert folder is not None
    try:
        if isinstance(content, OSError):
            raise content
        record = _ADAPTER.validate_json(content) if is_checked else from_json(content)
        if record.folder != folder:
            raise ValueError(f"it is the record of {record.folder.root}")
    except (OSError, ValueError, RecursionError) as error:
        unread = ConceptRecord(
            concept_id=folder.concept_id, fingerprint=folder.fingerprint, status="failed", placeholder_token=""
        )
        return unread.as_damaged(f"{path} cannot be read ({error})")
    return record if listing is None else _compare_sizes(record, listing)


def _compare_sizes(record: ConceptRecord, listing: ConceptListing) -> ConceptRecord:
    """Return the record, as a damaged one if its files are not there as it says."""
    damage = listing.damage(record.result, {name: file.bytes for name, file in record.files.items()})
    return record.as_damaged(damage) if damage else record


def damage_error(damage: str) -> str:
    """Return the error of a record that is damaged in this way."""
    return f"{_DAMAGED}{damage}; the next run learns it again"
