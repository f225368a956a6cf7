"""The concepts that are done: their record can be read and is as it was written, and their files are as it says.

Sizes are compared with the listing that a plan needs anyway; `verify` reads every file and compares its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.ledger.listing import ConceptListing
from pipeline.ledger.plan import DoneWork
from pipeline.ledger.record_cache import RecordCache
from pipeline.ledger.records import ConceptRecord, read_contents, record_or_failure
from pipeline.store import retries
from pipeline.store.errors import StoreFailed, describe_error
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

_VERIFY_THREADS = 8


def find_done(store: RunStore, *, verify: bool = False) -> DoneWork:
    """Return the concepts of an output that are done, and those whose record or files are damaged.

    On object stores, makes one listing, one request for the copy of all records and one for each record that the copy
    lacks. `verify` also reads every file. Raises StoreFailed if a record or a file cannot be read for now.
    """
    listing = ConceptListing(store.scan_with_times("concepts"))
    done = DoneWork(set(), listing.awaiting_retry)
    records = _read_records(store, listing)
    for record in _verified(store, records) if verify else records:
        if record.status == "done":
            done.fingerprints.add(record.fingerprint.encode())
        else:
            done.damaged[record.fingerprint] = record.error
    return done


def find_damaged(store: RunStore, listing: ConceptListing, max_reads: int) -> dict[str, str]:
    """Return fingerprint -> damage of records and of the files that they describe.

    On object stores only records in the copy of all records are looked at, and at most `max_reads` of those that have
    changed since it was made, which cost a request each. A record that cannot be read for now is not damaged.
    """
    cache = RecordCache(store)
    known = [each for each in listing.records.values() if not store.is_remote or cache.knows(each.path)]
    changed = [each for each in known if cache.content(each.path, each.num_bytes, each.written_at) is None]
    left_out = {entry.path for entry in changed[max_reads:]} if store.is_remote else set()
    damaged = {}
    for entry, content in read_contents(store, cache, (each for each in known if each.path not in left_out)):
        record = record_or_failure(entry.path, content, listing)
        if record.status != "done" and not isinstance(content, OSError):
            damaged[record.fingerprint] = record.error
    return damaged


def _read_records(store: RunStore, listing: ConceptListing) -> Iterator[ConceptRecord]:
    """Yield every record; a damaged one as a failure that names the damage."""
    for entry, content in read_contents(store, RecordCache(store), listing.records.values()):
        if isinstance(content, OSError) and retries.is_retryable(content):
            raise StoreFailed(f"{store.uri(entry.path)} cannot be read: {describe_error(content)}") from content
        yield record_or_failure(entry.path, content, listing)


def _verified(store: RunStore, records: Iterable[ConceptRecord]) -> Iterator[ConceptRecord]:
    """Yield the records, those with a file whose digest is another as failures that name it."""
    with ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="verify") as pool:
        yield from pool.map(lambda record: _compare_digests(store, record), records)


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
