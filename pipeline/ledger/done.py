"""The concepts that are done: their record can be read and is as it was written, and their files are as it says.

Sizes are compared with the listing that a plan needs anyway; `verify` reads every file and compares its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress, islice

from pipeline.ledger.listing import ConceptListing, Entry
from pipeline.ledger.plan import DoneWork
from pipeline.ledger.record_cache import RecordCache
from pipeline.ledger.record_files import RecordFiles
from pipeline.ledger.records import ConceptRecord, Content, damage_error, read_contents, record_or_failure
from pipeline.store import retries
from pipeline.store.errors import StoreFailed, describe_error
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

_BATCH = 20_000
_VERIFY_THREADS = 8


def find_done(store: RunStore, *, verify: bool = False) -> DoneWork:
    """Return the concepts of an output that are done, and those whose record or files are damaged.

    On object stores, makes one listing, the requests for the parts of the records and one for each record that they
    lack. `verify` also reads every file. Raises StoreFailed if a record or a file cannot be read for now.
    """
    listing = ConceptListing.of(store)
    done = DoneWork(set(), listing.awaiting_retry)
    for key, damage in _verified_damages(store, listing) if verify else _damages(store, listing):
        if damage:
            done.damaged[key.decode()] = damage
        else:
            done.fingerprints.add(key)
    return done


def find_damaged(store: RunStore, listing: ConceptListing, max_reads: int) -> dict[str, str]:
    """Return fingerprint -> damage of records and of the files that they describe.

    On object stores only records in the copies of records are looked at, and at most `max_reads` of those that have
    changed since, which cost a request each. A record that cannot be read for now is not damaged.
    """
    files = RecordFiles(store)
    damaged: dict[str, str] = {}
    rest = []
    for entry, damage in _copied_damages(files, listing):
        if damage is None:
            rest.append(entry)
        elif damage:
            damaged[entry.fingerprint] = damage
    if store.is_remote:
        rest = list(compress(rest, files.knows([entry.identity for entry in rest])))[:max_reads]
    for found in read_contents(store, rest):
        damage = _damage(found, listing)
        if damage and not isinstance(found.content, OSError):
            damaged[found.entry.fingerprint] = damage
    return damaged


def _damages(store: RunStore, listing: ConceptListing) -> Iterator[tuple[bytes, str]]:
    """Yield fingerprint and damage of every record; the damage is empty where the record and its files are as they
    were written."""
    rest = []
    for entry, damage in _copied_damages(RecordFiles(store), listing):
        if damage is None:
            rest.append(entry)
        else:
            yield entry.key, damage
    for found in read_contents(store, rest):
        _raise_if_passing(store, found)
        yield found.entry.key, _damage(found, listing)


def _copied_damages(files: RecordFiles, listing: ConceptListing) -> Iterator[tuple[Entry, str | None]]:
    """Yield every record with the damage of its files; None where it has to be read, as no part has a copy."""
    entries = iter(listing.records.values())
    while batch := list(islice(entries, _BATCH)):
        for entry, damage in zip(batch, files.damages(listing, batch), strict=True):
            yield entry, damage_error(damage) if damage else damage


def _damage(found: Content, listing: ConceptListing) -> str:
    record = record_or_failure(found.entry.path, found.content, listing)
    return "" if record.status == "done" else record.error


def _raise_if_passing(store: RunStore, found: Content) -> None:
    """Raise StoreFailed for an error of reading that may pass."""
    error = found.content
    if isinstance(error, OSError) and retries.is_retryable(error):
        raise StoreFailed(f"{store.uri(found.entry.path)} cannot be read: {describe_error(error)}") from error


def _verified_damages(store: RunStore, listing: ConceptListing) -> Iterator[tuple[bytes, str]]:
    """Yield the same as `_damages`, with files whose digest is another as damage."""

    def records() -> Iterator[ConceptRecord]:
        for found in read_contents(store, listing.records.values(), RecordCache(store)):
            _raise_if_passing(store, found)
            yield record_or_failure(found.entry.path, found.content, listing, is_checked=found.is_checked)

    with ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="verify") as pool:
        for record in pool.map(lambda each: _compare_digests(store, each), records()):
            yield record.fingerprint.encode(), "" if record.status == "done" else record.error


def _compare_digests(store: RunStore, record: ConceptRecord) -> ConceptRecord:
    for name, file in record.files.items() if record.status == "done" else ():
        path = record.result.file(name)
        try:
            found = hashlib.sha256(store.get(path)).hexdigest()
        except OSError as error:
            if retries.is_retryable(error):
                raise StoreFailed(f"{store.uri(path)} cannot be read: {describe_error(error)}") from error
            found = describe_error(error)
        if found != file.sha256:
            return record.as_damaged(f"{path} is not the file of its record: its SHA-256 is another ({found})")
    return record
