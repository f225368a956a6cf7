"""Files that parts describe, compared with a listing."""

from __future__ import annotations

import hashlib
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ledger import record_parts
from pipeline.ledger.listing import ConceptListing
from pipeline.ledger.record_files import RecordFiles
from pipeline.ledger.record_parts import FOLDER, WORDS, PartWriter
from pipeline.ledger.records import ConceptRecord, StoredFile, add_to_part, put_record, to_json
from pipeline.store.storage import RunStore
from tests.pipeline.s3_memory import S3Memory


@pytest.fixture
def store(s3_memory: S3Memory) -> RunStore:
    assert s3_memory.objects is not None
    return RunStore("s3://catalog/out")


def finish(store: RunStore, number: int, *names: str, kept: str = "") -> ConceptRecord:
    """Put files and record of a concept."""
    fingerprint = f"{number:032x}"
    sizes = {name: random.Random(f"{number} {name}").randrange(1, 200) for name in names}
    for name, size in sizes.items():
        store.put(f"concepts/c{number}/{kept or fingerprint}/{name}", bytes(size))
    record = ConceptRecord(
        concept_id=f"c{number}",
        fingerprint=fingerprint,
        status="done",
        placeholder_token="<c>",
        kept=kept,
        files={name: StoredFile(bytes=size, sha256="0" * 64) for name, size in sizes.items()},
    )
    put_record(store, record)
    return record


@pytest.fixture
def records(store: RunStore) -> list[ConceptRecord]:
    """Return records of concepts with different files, one with none, and one with those of another try."""
    names = ["a.bin", "b.bin", "c.bin"]
    found = [finish(store, number, *names[: number % 4]) for number in range(12)]
    return [*found, finish(store, 12, *names, kept="f" * 32)]


def damages(store: RunStore) -> dict[str, str | None]:
    """Return concept id -> damage."""
    listing = ConceptListing.of(store)
    entries = list(listing.records.values())
    found = RecordFiles(store).damages(listing, entries)
    return {entry.concept_id: damage for entry, damage in zip(entries, found, strict=True)}


def inflict(store: RunStore, records: list[ConceptRecord]) -> dict[str, str]:
    """Damage two concepts; return what is to be said of them."""
    store.delete(f"concepts/c7/{records[7].fingerprint}/b.bin")
    store.put(f"concepts/c12/{records[12].kept}/c.bin", bytes(777))
    size = records[12].files["c.bin"].bytes
    return {
        "c7": f"concepts/c7/{records[7].fingerprint}/b.bin is missing",
        "c12": f"concepts/c12/{records[12].kept}/c.bin has 777 bytes and not the {size} of its record",
    }


@pytest.mark.parametrize("rows", [3, 5000])
def test_files_are_compared_with_their_descriptions(
    rows: int, store: RunStore, records: list[ConceptRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_parts, "PART_ROWS", rows)
    parts = PartWriter(store)
    for record in records[1:]:
        add_to_part(parts, record)
    parts.flush()
    expected = {record.concept_id: "" for record in records} | {"c0": None}  # no part has it
    assert damages(store) == expected
    said = inflict(store, records)
    assert damages(store) == expected | said


def test_parts_of_earlier_releases_are_read(store: RunStore, records: list[ConceptRecord], s3_memory: S3Memory) -> None:
    """They hold the contents alone."""
    entries = ConceptListing.of(store).records.values()
    contents = {record.concept_id: to_json(record) for record in records}
    columns = {
        "identity": pa.array([entry.identity for entry in entries], pa.binary(8 * WORDS)),
        "content": [contents[entry.concept_id] for entry in entries],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    name = hashlib.md5(buffer.getvalue()).hexdigest()
    store.put(f"{FOLDER}/1-{name}.parquet", buffer.getvalue())
    said = inflict(store, records)
    s3_memory.requests.clear()
    assert damages(store) == {record.concept_id: "" for record in records} | said
    assert s3_memory.requests["get"] == 1


def test_what_is_no_record_or_has_changed_is_to_be_read(store: RunStore, records: list[ConceptRecord]) -> None:
    parts = PartWriter(store)
    for record in records:
        add_to_part(parts, record)
    path = records[2].folder.record
    for content in (b"garbage", b"[1]"):
        store.put(path, content)
        parts.add_content(path, content)
        parts.flush()
        assert [name for name, damage in damages(store).items() if damage is None] == ["c2"]
    listing = ConceptListing.of(store)
    identities = [each.identity for each in listing.records.values()]
    assert RecordFiles(store).knows([*identities, b""]) == [True] * len(identities) + [False]
    put_record(store, finish(store, 99))
    (other,) = (each for each in ConceptListing.of(store).records.values() if each.concept_id == "c99")
    assert RecordFiles(store).knows([other.identity]) == [False]


def test_without_parts_all_records_are_to_be_read(store: RunStore, records: list[ConceptRecord]) -> None:
    assert damages(store) == {record.concept_id: None for record in records}
