"""Identify photos by the MD5 of their content, found out as cheaply as the store allows.

S3 lists that hash (the entity tag of an object put in one part) for 1,000 objects a request, so telling whether any of
10,000 photos has changed costs tens of requests and moves no pictures. Everywhere else the bytes are read and hashed.
The same photo has the same hash at any address, except under S3 encryption with its owner's keys, where the tag is
another value that also changes with every write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.config import PhotoConfig
from pipeline.inputs.photos import check_scheme, content_md5, fetch
from pipeline.store import s3
from pipeline.store.addresses import (
    MAX_BYTES,
    absolute,
    find_files,
    is_s3,
    open_filesystem,
    open_for_reading,
    read_bytes,
)
from pipeline.store.errors import describe_error
from textual_inversion.errors import BadInput

_THREADS = 16

_KEYS_PER_LOOKUP = 1000
"""Keys of one bucket that one thread looks up in listings."""


def content_hashes(
    uris: Iterable[str], photos: PhotoConfig | None = None, limit: int = MAX_BYTES
) -> dict[str, str | OSError | ValueError]:
    """Return URI -> MD5 of the content (32 hex digits), or the error that says why there is none, as for a missing
    photo.

    `photos` bounds what is read; None reads anything of at most `limit` bytes, for addresses that no manifest named.
    Hand over many photos at once: those of one bucket are looked up together, in as few listings as their keys allow.
    """
    found: dict[str, str | OSError | ValueError] = {}
    wanted = sorted(set(uris))
    for uri in wanted:
        if refusal := _refusal(uri, photos):
            found[uri] = refusal
    allowed = [uri for uri in wanted if uri not in found]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="content-hash") as pool:
        for listed in pool.map(lambda lookup: _look_up(*lookup), _s3_lookups(allowed)):
            found |= listed
        rest = [uri for uri in allowed if uri not in found]
        found |= zip(rest, pool.map(lambda uri: _hash_bytes(uri, photos, limit), rest), strict=True)
    return found


def folder_hash(uri: str) -> str:
    """Return one BLAKE2b hash (32 hex digits) over the names and contents of all files in a folder, for a frozen model
    that a run depends on. Raises FileNotFoundError if there are none."""
    digest = hashlib.blake2b(digest_size=16)
    uri = absolute(uri)
    files = find_files(uri, "")
    if not files:
        raise FileNotFoundError(f"no files at {uri}")
    root = len(open_filesystem(uri)[1].rstrip("/")) + 1
    for file in files:
        content = hashlib.blake2b(digest_size=16)
        with open_for_reading(file) as handle:
            while chunk := handle.read(2**23):
                content.update(chunk)
        digest.update(f"{open_filesystem(file)[1][root:]}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _s3_lookups(uris: list[str]) -> list[tuple[Any, str, dict[str, str]]]:
    """Return (file system, bucket, key -> URI) for the photos on S3, at most `_KEYS_PER_LOOKUP` keys in each."""
    buckets: dict[str, tuple[Any, dict[str, str]]] = {}
    for uri in uris:
        if not uri.startswith(("s3://", "s3a://")):
            continue
        try:
            fs, path = open_filesystem(uri)
        except Exception:  # reading it will say why
            continue
        bucket, _, key = path.partition("/")
        if is_s3(fs) and key:
            buckets.setdefault(bucket, (fs, {}))[1][key] = uri
    lookups = []
    for bucket, (fs, by_key) in buckets.items():
        keys = sorted(by_key)
        for start in range(0, len(keys), _KEYS_PER_LOOKUP):
            lookups.append((fs, bucket, {key: by_key[key] for key in keys[start : start + _KEYS_PER_LOOKUP]}))
    return lookups


def _look_up(fs: Any, bucket: str, by_key: dict[str, str]) -> dict[str, str]:
    return {by_key[key]: md5 for key, md5 in s3.listed_md5s(fs, bucket, by_key).items()}


def _refusal(uri: str, photos: PhotoConfig | None) -> ValueError | None:
    try:
        if photos is not None:
            check_scheme(uri, photos)
    except ValueError as error:
        return error
    return None


def _hash_bytes(uri: str, photos: PhotoConfig | None, limit: int) -> str | OSError | ValueError:
    try:
        data = read_bytes(uri, limit) if photos is None else fetch(uri, photos)
        return content_md5(data)
    except (OSError, ValueError) as error:
        return error
    except Exception as error:  # of a store's client, which may raise anything
        return BadInput(describe_error(error))
