"""The concepts that are done: their record can be read and is as it was written, and their files are as it says.

Sizes are compared with the listing that a plan needs anyway; `verify` reads every file and compares its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress

from pipeline.ledger.listing import ConceptListing, Entry
from pipeline.ledger.plan import DoneWork
from pipeline.ledger.record_cache import RecordCache
from pipeline.ledger.records import ConceptRecord, Content, damage_of, read_contents, record_or_failure
from pipeline.store import retries
from pipeline.store.errors import StoreFailed, describe_error
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

_VERIFY_THREADS = 8


def find_done(store: RunStore, *, verify: bool = False) -> DoneWork:
    """Return the concepts of an output that are done, and those whose record or files are damaged.

    On object stores, makes one listing, the requests for the parts of the records and one for each record that they
    lack. `verify` also reads every file. Raises StoreFailed if a record or a file cannot be read for now.
    """
    listing = ConceptListing(store.scan_objects("concepts"))
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
    cache = RecordCache(store)
    entries = list(listing.records.values())
    known = _some(entries, cache.knows) if store.is_remote else entries
    changed = _some(known, lambda identities: [not each for each in cache.has(identities)])
    left_out = {entry.key for entry in changed[max_reads:]} if store.is_remote else set()
    damaged = {}
    for found in read_contents(store, cache, (each for each in known if each.key not in left_out)):
        damage = _damage(found, listing)
        if damage and not isinstance(found.content, OSError):
            damaged[found.entry.fingerprint] = damage
    return damaged


def _some(entries: Sequence[Entry], choose: Callable[[Sequence[bytes]], Iterable[bool]]) -> list[Entry]:
    """Return the entries whose identities are chosen."""
    return list(compress(entries, choose([each.identity for each in entries])))


def _damages(store: RunStore, listing: ConceptListing) -> Iterator[tuple[bytes, str]]:
    """Yield fingerprint and damage of every record; the damage is empty where the record and its files are as they
    were written."""
    for found in read_contents(store, RecordCache(store), listing.records.values()):
        _raise_if_passing(store, found)
        yield found.entry.key, _damage(found, listing)


def _damage(found: Content, listing: ConceptListing) -> str:
    if found.is_checked and isinstance(found.content, bytes):
        return damage_of(found.content, found.entry, listing)
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
        for found in read_contents(store, RecordCache(store), listing.records.values()):
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
