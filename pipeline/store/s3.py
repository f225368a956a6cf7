"""Features of S3 that fsspec does not offer: pages of listings with entity tags, and conditional puts."""

from __future__ import annotations

import datetime
import logging
import os
import posixpath
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_plus
from xml.sax.saxutils import unescape

import fsspec
import fsspec.asyn

from pipeline.store import retries
from pipeline.store.redact import redact

log = logging.getLogger(__name__)

_BEFORE_PARSE = "before-parse.*.ListObjectsV2"
"""Event of the client between the bytes of an answer to a listing request and their reading. Under this name a handler
is called before the client's own, which parses what it finds to look for an error in it."""

_PAGE = "Page"
"""Key of the objects of a page in the client's answer, where `_read_contents` took them out."""

_FIELDS = (
    r"<Key>([^<]*)</Key>",
    r"<LastModified>([^<]*)</LastModified>",
    r"<ETag>(?:&quot;|&#34;|\")?([^<&\"]*)(?:&quot;|&#34;|\")?</ETag>",
    r"<Size>(\d+)</Size>",
)
_BEGIN, _END = "<Contents>", "</Contents>"
_OBJECT = re.compile(_BEGIN + r"\s*" + r"\s*(?:<Checksum\w+>\w*</Checksum\w+>\s*)*".join(_FIELDS))
"""Beginning of an object as S3 and most stores write it: with this order of the fields, one search finds all of them in
half the time of a search for each."""
_NEXT = re.compile(rf"{_END}\s*{_BEGIN}")
_IS_QUOTED = "<EncodingType>url</EncodingType>"
"""Element of an answer whose keys are encoded as in an address, which the client asks for and undoes in its own."""
_QUOTES = {"&quot;": '"', "&apos;": "'"}

_USER_AGENT = "textual-inversion-ray"
"""Name by which stores know the client. The client's own, put together anew for each request, takes a tenth of a
request's CPU time."""

_RENEWAL_S = 2.0
"""Seconds within which threads that find the same credentials expired renew them only once."""

_renewal_lock = threading.Lock()


class Page(NamedTuple):
    """Objects of one page of a listing, column by column: a million concepts are five million objects, and an object
    of Python for each takes as long as reading the answer."""

    keys: Sequence[str]
    sizes: Sequence[int]
    """Bytes of each object."""
    etags: Sequence[str]
    """Entity tags; the MD5 of the content for an object put in one part and not encrypted with its owner's keys."""
    times: Sequence[Any]
    """Modification times, each as the store writes it; see `timestamp`."""


def options_without_retries() -> dict[str, Any]:
    """Return options of an S3 file system whose client repeats nothing, because `with_retries` does. Retries that the
    user has configured for botocore stay, and so does a user agent."""
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    if "AWS_MAX_ATTEMPTS" in os.environ or not isinstance(configured, Mapping) or "retries" in configured:
        return {}
    return {
        "config_kwargs": {
            "user_agent": _USER_AGENT,
            **configured,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
    }


def renew_credentials(fs: Any) -> None:
    """Read credentials again from where the client finds them; the client itself renews those of a role."""
    with _renewal_lock:
        if time.monotonic() - getattr(fs, "_renewed_s", -_RENEWAL_S) >= _RENEWAL_S:
            fs.connect(refresh=True)
            fs._renewed_s = time.monotonic()


def put_hashed(fs: Any, path: str, data: bytes) -> str:
    """Put an object and return its entity tag: the MD5 of what S3 holds, or another value where S3 encrypts with its
    owner's keys."""
    return _etag(_call(fs, "put_object", path, Body=data))


def put_if_match(fs: Any, path: str, data: bytes, etag: str) -> str:
    """Put an object only if the present one has this tag, or if `etag` is "" and none is present; return the new tag.

    Raises FileExistsError otherwise, and also if the put succeeded but its answer was lost: its repetition then finds
    the object.
    """
    condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
    try:
        answer = _call(fs, "put_object", path, Body=data, **condition)
    except OSError as error:
        if retries.error_status(error) == 412 or (etag and isinstance(error, FileNotFoundError)):
            raise FileExistsError(path) from error
        raise
    return _etag(answer)


def get_etag(fs: Any, path: str) -> str:
    """Return the entity tag of an object. Raises FileNotFoundError if there is none."""
    return _etag(_call(fs, "head_object", path))


def get_with_etag(fs: Any, path: str, limit: int) -> tuple[bytes, str]:
    """Return the first `limit` bytes of an object, and the entity tag that the object had when they were read."""
    bucket, _, key = path.partition("/")

    def get() -> tuple[bytes, str]:
        answer = fs.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{limit - 1}")
        data: bytes = fsspec.asyn.sync(fs.loop, answer["Body"].read)
        return data, _etag(answer)

    return retries.with_retries(get, lambda: renew_credentials(fs))


def list_page(fs: Any, bucket: str, prefix: str, **options: Any) -> tuple[Page, str]:
    """Make one listing request: return up to 1,000 objects in the order of their keys, and a token for the next page
    ("" on the last).

    `options` are the request's StartAfter or ContinuationToken, and MaxKeys. fsspec's own `find` keeps a dictionary of
    every object.
    """

    def request() -> Any:
        fs.s3.meta.events.register(_BEFORE_PARSE, _read_contents, unique_id=_BEFORE_PARSE)
        return fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)

    answer = retries.with_retries(request, lambda: renew_credentials(fs))
    listed = answer.get("Contents", ())
    page = answer.get(_PAGE) or Page(
        [entry["Key"] for entry in listed],
        [int(entry["Size"]) for entry in listed],
        [_etag(entry) for entry in listed],
        [entry.get("LastModified", 0.0) for entry in listed],
    )
    return page, answer.get("NextContinuationToken", "") if answer.get("IsTruncated") else ""


def _read_contents(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the objects out of the answer to a listing request, and leave all else in it to the client: errors, the
    token, and an answer that is not whole. The client's parser takes 60 ms of CPU time for 1,000 objects, as it looks
    every field up in the service's description, and this 2 ms.
    """
    body = response_dict["body"].decode("utf-8", "replace")
    begin, end = body.find(_BEGIN), body.rfind(_END) + len(_END)
    contents, rest = body[begin:end], body[:begin] + body[end:]
    num_objects = contents.count(_BEGIN)
    found = _OBJECT.findall(contents)
    is_in_order = found and len(found) == num_objects
    columns = list(zip(*found, strict=True)) if is_in_order else [re.findall(field, contents) for field in _FIELDS]
    keys, times, etags, sizes = columns
    counts = {len(_NEXT.findall(contents)) + 1, num_objects, *map(len, columns)}
    if len(counts) > 1 or "<![CDATA[" in body or "\ufffd" in body or any("&#" in key for key in keys):
        return  # other elements, or characters that are given by their numbers or are none
    keys = [unescape(key, _QUOTES) if "&" in key else key for key in keys]
    if _IS_QUOTED in rest:
        keys = [unquote_plus(key) if "%" in key or "+" in key else key for key in keys]
    customized_response_dict[_PAGE] = Page(keys, list(map(int, sizes)), etags, times)
    response_dict["body"] = rest.encode()


def listed_md5s(fs: Any, bucket: str, keys: Iterable[str]) -> dict[str, str]:
    """Look up the content MD5s of many keys of a bucket by a merge join of the sorted keys with the bucket's listing,
    which jumps over stretches that hold no wanted key.

        wanted keys     a/0003   a/0007                       b/9999
        pages listed   |a/0003 a/0004 ... a/1002|            |b/9999 ...|
        StartAfter     ^ just before a/0003                  ^ just before b/9999, the first key not settled yet

    Each request settles at least one key and at most 1,000. The answer leaves out keys that are absent, whose objects
    were put in several parts (their tag is no MD5), or that a store lists out of order; after a failed listing (no
    right to list, say) also all keys that follow.
    """
    wanted = sorted(keys)
    wanted_set = set(wanted)
    found: dict[str, str] = {}
    prefix = posixpath.commonprefix([posixpath.dirname(key) + "/" for key in wanted]).rpartition("/")[0]
    position = 0
    after = ""
    while position < len(wanted):
        after = max(after, _string_just_before(wanted[position]))
        try:
            page, _ = list_page(fs, bucket, f"{prefix}/" if prefix else "", StartAfter=after)
        except Exception as error:  # no listing is needed
            log.warning(
                "cannot list s3://%s/%s (%s): photos there are read instead", bucket, prefix, redact(str(error))
            )
            return found
        listed = zip(page.keys, page.etags, strict=True)
        found |= {key: etag for key, etag in listed if key in wanted_set and len(etag) == 32}
        if not page.keys or page.keys[-1] <= after:
            return found
        after = page.keys[-1]
        while position < len(wanted) and wanted[position] <= after:
            position += 1
    return found


def modification_time(info: Mapping[str, Any]) -> float:
    """Return when a listed object was written, in seconds since 1970; 0 if no field says. Each store names the field
    differently."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if value is not None:
            return timestamp(value)
    return 0.0


def timestamp(value: Any) -> float:
    """Return a time of a listing in seconds since 1970; `value` is text in ISO 8601, a datetime or already seconds."""
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime.datetime) else float(value)


def _call(fs: Any, method: str, path: str, **arguments: Any) -> dict[str, Any]:
    bucket, _, key = path.partition("/")
    answer: dict[str, Any] = retries.with_retries(
        lambda: fs.call_s3(method, Bucket=bucket, Key=key, **arguments), lambda: renew_credentials(fs)
    )
    return answer


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _string_just_before(key: str) -> str:
    """Return a string that sorts before `key` with next to no keys in between, for listings that start after it."""
    return key[:-1] + chr(ord(key[-1]) - 1) + "~" if "!" <= key[-1] <= "~" else key[:-1]
