"""Addresses of objects (local paths and fsspec URIs): make them absolute, check them, and read what they name.

Only this package knows fsspec. A file system is opened anew in every process; only URIs cross process borders.
Endpoints and credentials come from the environment or fsspec's own configuration, e.g. AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import IO, Any, TypeVar

import fsspec

from pipeline.config import SCHEMES
from pipeline.store import http_client, retries, s3
from pipeline.store.redact import redact

MAX_BYTES = 64 * 2**20
"""Default limit on the size of an object that is read whole."""

_BUCKET = re.compile(
    r"[A-Za-z0-9._-]{1,255}|arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:[0-9]{12}:accesspoint:[A-Za-z0-9.-]{1,63}"
)
"""Names of buckets and access points that S3's client takes (botocore's `VALID_BUCKET` and `VALID_S3_ARN`)."""

_RAY_COPIES = re.compile(r"/runtime_resources/(working_dir|py_modules)_files/")
"""Part of the path of files that Ray has copied to a node for a job."""

_LOST_SLASHES = re.compile(rf"(?:{'|'.join(sorted(set(SCHEMES) - {'file', 'memory'}))}):(?!//)")
"""Beginning of an address of a store that would be taken for a local path."""

_SHOWN_CHARACTERS = 200

T = TypeVar("T")


def absolute(path_or_uri: str) -> str:
    """Return a URI unchanged, and a local path made absolute from the current directory, so that workers elsewhere
    agree on it."""
    _refuse_malformed(path_or_uri)
    if "://" in path_or_uri:
        _scheme(path_or_uri)
        return path_or_uri.rstrip("/") if not path_or_uri.endswith("://") else path_or_uri
    return os.path.abspath(os.path.expanduser(path_or_uri))


def absolute_output(path_or_uri: str) -> str:
    """Return `absolute` of an address to write to. Raises ValueError for a folder in Ray's copy of a job's files, which
    Ray deletes some time after the job, and which a job with other files does not have."""
    path = absolute(path_or_uri)
    if _RAY_COPIES.search(f"{path}/"):
        raise ValueError(
            f"the output {path} lies in Ray's own copy of the job's working directory, which Ray deletes; name a place "
            "that all nodes see, for example --output s3://bucket/name or --output /mnt/name"
        )
    return path


def resolve(uri: str, relative_to: str) -> str:
    """Return the absolute address of `uri` as written in the manifest file `relative_to` (itself an absolute URI).

    Raises ValueError for schemes that are not allowed and for local paths in a manifest that is not local.
    """
    _refuse_malformed(uri)
    if "://" in uri:
        _scheme(uri)
        return uri
    scheme, folder, top = _split_manifest_uri(relative_to)
    if uri.startswith("/"):
        if scheme != "file":
            raise ValueError(f"{uri!r} is a path on one machine, but the manifest is at {scheme}://; write a full URI")
        return uri
    path = posixpath.normpath(folder + uri)
    if scheme not in ("file", "memory") and not path.startswith(f"{top}/"):
        raise ValueError(f"{redact(uri)!r} leads out of {redact(f'{scheme}://{top}')}; write a full URI")
    return path if scheme == "file" else f"{scheme}://{path}"


def read_bytes(uri: str, limit: int = MAX_BYTES) -> bytes:
    """Read a whole object. Raises OSError if it cannot be read, ValueError if it is larger than `limit` bytes."""
    data = read_beginning(uri, limit + 1, limit)
    if len(data) > limit:
        raise ValueError(f"{redact(uri)} has more than {limit:,} bytes")
    return data


def read_beginning(uri: str, num_bytes: int, limit: int = MAX_BYTES) -> bytes:
    """Read the first `num_bytes` of an object, or all of a smaller one; over HTTP all of any, as servers need not give
    parts.

    Raises OSError if it cannot be read, and over HTTP ValueError if it is larger than `limit` bytes.
    """
    fs, path = open_filesystem(uri)
    if _is_http(fs):
        return http_client.read(path, limit)
    if is_local(fs):
        _check_plain_file(path)
    return call_with_retries(fs, lambda: _read_up_to(fs, path, num_bytes))


def read_with_etag(uri: str, limit: int = MAX_BYTES) -> tuple[bytes, str] | None:
    """Read a whole object on S3 and the entity tag of exactly these bytes; None at addresses without entity tags.

    Raises OSError if the object cannot be read, ValueError if it is larger than `limit` bytes.
    """
    fs, path = open_filesystem(uri)
    if not is_s3(fs):
        return None
    data, etag = s3.get_with_etag(fs, path, limit + 1)
    if len(data) > limit:
        raise ValueError(f"{redact(uri)} has more than {limit:,} bytes")
    return data, etag


def open_for_reading(uri: str) -> AbstractContextManager[IO[bytes]]:
    """Open a seekable file handle that fetches only the ranges that are read, for Parquet.

    Raises OSError if there is no such object, ValueError for a local pipe, device or file of the kernel.
    """
    fs, path = open_filesystem(uri, client_retries=True)
    if is_local(fs):
        _check_plain_file(path)
    handle: AbstractContextManager[IO[bytes]] = call_with_retries(fs, lambda: fs.open(path, "rb"))
    return handle


def find_files(uri: str, suffix: str) -> list[str]:
    """Return the sorted URIs of one file, of all files with this suffix in a folder and its subfolders, or of the
    matches of a glob.

    Names beginning with `_` or `.` are bookkeeping of other tools and left out, except when named outright.
    """
    fs, path = open_filesystem(uri, client_retries=True)
    if any(c in path for c in "*?["):
        found = fs.glob(path)
    elif fs.isdir(path):
        root = path.rstrip("/") + "/"
        found = [root + name for name in _files_inside(fs, root) if name.endswith(suffix)]
    else:
        found = [path] if fs.isfile(path) else []
    return sorted(_to_uri(name, like=uri) for name in found)


def files_of_folder(uri: str) -> list[str] | None:
    """Return the sorted paths, relative to a folder, of all files in it and its subfolders; None if it is no folder.

    Names beginning with `_` or `.` are left out.
    """
    fs, path = open_filesystem(uri, client_retries=True)
    return sorted(_files_inside(fs, path.rstrip("/") + "/")) if fs.isdir(path) else None


def _files_inside(fs: Any, root: str) -> list[str]:
    """Return the paths, relative to the folder `root/`, of the files in it; those of other tools' bookkeeping left
    out."""
    names = (name[len(root) :] for name in fs.find(root))
    return [name for name in names if not any(part[:1] in "._" for part in name.split("/"))]


def open_filesystem(uri: str, *, client_retries: bool = False) -> tuple[Any, str]:
    """Return this process's fsspec file system for an address, and the path in its terms.

    `client_retries` lets an S3 client repeat calls that fail for a moment: for libraries that call the file system
    themselves, and for calls that `call_with_retries` does not cover.
    """
    _refuse_malformed(uri)
    no_client_retries = _scheme(uri) in ("s3", "s3a") and not client_retries
    fs, path = fsspec.url_to_fs(
        uri, use_listings_cache=False, **(s3.options_without_retries() if no_client_retries else {})
    )
    if no_client_retries:
        fs.retries = 1
    return fs, path


def filesystem_for_workers(uri: str) -> tuple[Any, str]:
    """Return a file system that a library may pickle for other processes, with credentials read just now, and the path
    in its terms."""
    fs, path = open_filesystem(uri, client_retries=True)
    if is_s3(fs):
        s3.renew_credentials(fs)
    return fs, path


def call_with_retries(fs: Any, call: Callable[[], T]) -> T:
    """Call a file system, and again while its errors may pass (`retries`) unless it is local or in memory."""
    if is_local(fs) or "memory" in _protocols(fs):
        return call()
    return retries.with_retries(call, partial(s3.renew_credentials, fs) if is_s3(fs) else None)


def is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def is_s3(fs: Any) -> bool:
    return "s3" in _protocols(fs)


def _is_http(fs: Any) -> bool:
    return "http" in _protocols(fs)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _check_plain_file(path: str) -> None:
    """Raise ValueError for a local path that is there and is no file on a disk: reading a pipe, a device or a file of
    the kernel might never end, or show another process's secrets."""
    real = os.path.realpath(path)
    is_of_kernel = real.startswith(("/proc/", "/sys/", "/dev/")) and not real.startswith("/dev/shm/")
    if os.path.exists(path) and (is_of_kernel or not os.path.isfile(path)):
        raise ValueError(f"{path} is a folder, or no plain file")


def _read_up_to(fs: Any, path: str, limit: int) -> bytes:
    """Read the first `limit` bytes in one request, whatever the object's size."""
    try:
        data: bytes = fs.cat_file(path, start=0, end=limit)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except OSError:
        if fs.size(path) == 0:  # a range of an empty object is an error on S3
            return b""
        raise
    return data


@lru_cache(16)
def _split_manifest_uri(file: str) -> tuple[str, str, str]:
    """Return the scheme, the folder with `/` at its end, and the bucket, container or host ("" where there is none) of
    a manifest file."""
    scheme = _scheme(file)
    base = file.partition("://")[2] if "://" in file else file
    return scheme, posixpath.join(posixpath.dirname(base), ""), base.split("/")[0]


def _refuse_malformed(uri: str) -> None:
    if ":" not in uri:
        return
    if _LOST_SLASHES.match(uri):
        raise ValueError(f"{redact(_cut(uri))!r} lacks the slashes after its scheme; write {uri.partition(':')[0]}://")
    if "::" in uri:
        raise ValueError(f"{redact(uri)!r} is a chained URL; name the object itself")


def _scheme(uri: str) -> str:
    """Return the scheme of an address. Raises ValueError for one that is not allowed, and for an S3 address whose
    bucket can be none: the client's own error for it is no OSError and shows credentials before an `@`."""
    scheme, _, rest = uri.partition("://") if "://" in uri else ("file", "", uri)
    if scheme not in SCHEMES:
        raise ValueError(f"{redact(uri)!r} begins with {scheme}://; allowed are {', '.join(SCHEMES)}")
    if scheme in ("s3", "s3a") and not _BUCKET.fullmatch(rest.partition("/")[0]):
        raise ValueError(
            f"{redact(_cut(uri))!r} names no bucket: letters, digits, '.', '-' and '_', 255 at most, or an access "
            "point as arn:aws:s3:REGION:ACCOUNT:accesspoint:NAME; credentials belong in the environment"
        )
    return scheme


def _cut(uri: str) -> str:
    return uri if len(uri) <= _SHOWN_CHARACTERS else f"{uri[:_SHOWN_CHARACTERS]}..."


def _to_uri(path: str, like: str) -> str:
    """Return a path in a file system's own terms as a URI with the scheme of `like`."""
    if "://" in path:  # fsspec's HTTP file system keeps whole URLs
        return path
    scheme = _scheme(like)
    return path if scheme == "file" else f"{scheme}://{path.lstrip('/')}"
