"""What a photo's bytes are, found out as cheaply as the store allows: the MD5 of its content.

S3 lists that hash (the entity tag of an object put in one part) for 1,000 objects a request, so telling whether any of
10,000 photos has changed costs tens of requests and moves no pictures. Everywhere else the bytes are read and hashed.
The same photo has the same identity wherever it lies, except under S3 encryption with own keys, where the tag is
another value that also changes with every write.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.config import PhotoConfig
from pipeline.inputs.photos import check_scheme, fetch
from pipeline.store import s3
from pipeline.store.redact import redact
from pipeline.store.storage import absolute, is_s3, match, open_for_reading, open_store, read_bytes

log = logging.getLogger(__name__)

_THREADS = 16
_KEYS_PER_SWEEP = 1000


def content_hashes(uris: Iterable[str], photos: PhotoConfig | None = None) -> dict[str, str | OSError | ValueError]:
    """URI -> content identity (32 hex digits), or the error that says why there is none, as for a missing photo.

    `photos` bounds what is read; None reads anything, for addresses that no manifest named. Hand over many photos at
    once: those of one bucket are looked up together, in as few listings as their keys allow.
    """
    found: dict[str, str | OSError | ValueError] = {}
    for uri in (wanted := sorted(set(uris))):
        if refusal := _refusal(uri, photos):
            found[uri] = refusal
    unique = [uri for uri in wanted if uri not in found]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="identify") as pool:
        for sweep in pool.map(lambda job: _sweep(*job), _sweeps(unique)):
            found |= sweep
        rest = [uri for uri in unique if uri not in found]
        found |= zip(rest, pool.map(lambda uri: _hash_bytes(uri, photos), rest), strict=True)
    return found


def folder_hash(uri: str) -> str:
    """One hash for all files in a folder, by name and content; for the frozen model that a run depends on."""
    digest = hashlib.blake2b(digest_size=16)
    uri = absolute(uri)
    files = match(uri, "")
    if not files:
        raise FileNotFoundError(f"no files at {uri}")
    root = len(open_store(uri)[1].rstrip("/")) + 1
    for file in files:
        content = hashlib.blake2b(digest_size=16)
        with open_for_reading(file) as handle:
            while chunk := handle.read(2**23):
                content.update(chunk)
        digest.update(f"{open_store(file)[1][root:]}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _sweeps(uris: list[str]) -> list[tuple[Any, str, dict[str, str]]]:
    """(store, bucket, key -> URI) for photos whose store lists content hashes."""
    buckets: dict[str, tuple[Any, dict[str, str]]] = {}
    for uri in uris:
        if not uri.startswith(("s3://", "s3a://")):
            continue
        try:
            fs, path = open_store(uri)
        except ValueError:
            continue
        bucket, _, key = path.partition("/")
        if is_s3(fs) and key:
            buckets.setdefault(bucket, (fs, {}))[1][key] = uri
    jobs = []
    for bucket, (fs, by_key) in buckets.items():
        keys = sorted(by_key)
        for start in range(0, len(keys), _KEYS_PER_SWEEP):
            jobs.append((fs, bucket, {key: by_key[key] for key in keys[start : start + _KEYS_PER_SWEEP]}))
    return jobs


def _sweep(fs: Any, bucket: str, wanted: dict[str, str]) -> dict[str, str | OSError | ValueError]:
    """Walk the bucket's listing and the sorted keys side by side, jumping over what is not asked for.

    Every request settles at least one key and at most 1,000. What it leaves open (absent, put in several parts, listed
    out of order by a store that does so) is read by the caller.
    """
    found: dict[str, str | OSError | ValueError] = {}
    keys = list(wanted)
    prefix = posixpath.commonprefix([posixpath.dirname(key) + "/" for key in keys]).rpartition("/")[0]
    position, after = 0, ""
    while position < len(keys):
        after = max(after, _just_before(keys[position]))
        try:
            entries, _ = s3.page(fs, bucket, f"{prefix}/" if prefix else "", StartAfter=after)
        except OSError as error:  # no right to list, say; a missing bucket is told of photo by photo
            log.warning(
                "cannot list s3://%s/%s (%s): photos there are read instead", bucket, prefix, redact(str(error))
            )
            return found
        for key, _, tag, _ in entries:
            if key in wanted and len(tag) == 32:
                found[wanted[key]] = tag
        if not entries or entries[-1][0] <= after:
            return found
        after = entries[-1][0]
        while position < len(keys) and keys[position] <= after:
            position += 1
    return found


def _just_before(key: str) -> str:
    """A string that sorts before `key` with next to nothing in between (listings start behind it)."""
    return key[:-1] + chr(ord(key[-1]) - 1) + "~" if "!" <= key[-1] <= "~" else key[:-1]


def _refusal(uri: str, photos: PhotoConfig | None) -> ValueError | None:
    try:
        if photos is not None:
            check_scheme(uri, photos)
    except ValueError as error:
        return error
    return None


def _hash_bytes(uri: str, photos: PhotoConfig | None) -> str | OSError | ValueError:
    try:
        data = read_bytes(uri) if photos is None else fetch(uri, photos)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()
    except (OSError, ValueError) as error:
        return error
