"""What S3 can do and fsspec does not offer: listings page by page with entity tags, and puts on a condition."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

from pipeline.store import retries

S3Entry = tuple[str, int, str, float]
"""Key, bytes, entity tag, and the time of writing in seconds since 1970."""

_RENEWAL_S = 2.0
"""Threads that find the same credentials expired renew them once."""

_renewing = threading.Lock()


def is_clients(error: Exception) -> bool:
    """Whether an S3 client raised it: no credentials, no such host. Those are no OSErrors, as others' are."""
    return type(error).__module__.startswith("botocore.")


def single_tries() -> dict[str, Any]:
    """Options of an S3 store whose client repeats nothing: `with_retries` does. Whoever has configured retries of
    botocore keeps them."""
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    if "AWS_MAX_ATTEMPTS" in os.environ or not isinstance(configured, Mapping) or "retries" in configured:
        return {}
    return {"config_kwargs": {**configured, "retries": {"total_max_attempts": 1, "mode": "standard"}}}


def renew(fs: Any) -> None:
    """Read credentials anew from where the client finds them; those of a role renew themselves."""
    with _renewing:
        if time.monotonic() - getattr(fs, "_renewed_s", -_RENEWAL_S) >= _RENEWAL_S:
            fs.connect(refresh=True)
            fs._renewed_s = time.monotonic()


def put_hashed(fs: Any, path: str, data: bytes) -> str:
    """Put an object; the MD5 of what S3 holds now, or another tag where it encrypts with keys of its own."""
    bucket, _, key = path.partition("/")
    answer = retries.with_retries(
        lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data), lambda: renew(fs)
    )
    return str(answer.get("ETag", "")).strip('"')


def put_if(fs: Any, path: str, data: bytes, wanted: str) -> str:
    """Put an object only if the one there has this tag, or if "" none is there; returns the new tag. Raises
    FileExistsError if it is not so: also when an answer was lost and it is there by this very call."""
    bucket, _, key = path.partition("/")
    condition = {"IfMatch": f'"{wanted}"'} if wanted else {"IfNoneMatch": "*"}
    try:
        answer = retries.with_retries(
            lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition), lambda: renew(fs)
        )
    except OSError as error:
        if retries.error_status(error) == 412 or (wanted and isinstance(error, FileNotFoundError)):
            raise FileExistsError(path) from error
        raise
    return str(answer.get("ETag", "")).strip('"')


def tag(fs: Any, path: str) -> str:
    """Of an object; FileNotFoundError if there is none."""
    bucket, _, key = path.partition("/")
    answer = retries.with_retries(lambda: fs.call_s3("head_object", Bucket=bucket, Key=key), lambda: renew(fs))
    return str(answer.get("ETag", "")).strip('"')


def page(fs: Any, bucket: str, prefix: str, **start: str) -> tuple[list[S3Entry], str]:
    """One request: up to 1,000 entries in the order of their keys, and a token for more ("" for none).

    `start` is the request's StartAfter or ContinuationToken. fsspec's own `find` keeps a dictionary of every object.
    """
    found = retries.with_retries(
        lambda: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **start), lambda: renew(fs)
    )
    entries = [
        (entry["Key"], entry["Size"], entry.get("ETag", "").strip('"'), written(entry))
        for entry in found.get("Contents", ())
    ]
    return entries, found.get("NextContinuationToken", "") if found.get("IsTruncated") else ""


def scan(fs: Any, bucket: str, prefix: str) -> Iterator[S3Entry]:
    """All entries, page by page."""
    entries, token = page(fs, bucket, prefix)
    yield from entries
    while token:
        entries, token = page(fs, bucket, prefix, ContinuationToken=token)
        yield from entries


def written(info: Mapping[str, Any]) -> float:
    """When an object of a listing was written; every store has its own word for it."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    return 0.0
