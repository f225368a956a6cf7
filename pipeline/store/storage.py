"""Where a run's bytes are: the only module that knows paths and fsspec.

Local disk, `memory://` and object stores look alike: whole objects are put, got and listed, and a listing is never
answered from a cache. Stores are made anew in every process; only URIs cross process borders.
Endpoints and credentials come from the environment or fsspec's own configuration, e.g. AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from pipeline.config import SCHEMES
from pipeline.store import disk, http_client, retries, s3
from pipeline.store.errors import StoreFailed
from pipeline.store.redact import redact

MAX_BYTES = 64 * 2**20
"""Largest object that is read whole, unless said otherwise."""


T = TypeVar("T")


def absolute(path_or_uri: str) -> str:
    """A URI as it is; a local path made absolute from the current directory, so that workers elsewhere agree on it."""
    if "://" in path_or_uri:
        _scheme(path_or_uri)
        return path_or_uri.rstrip("/") if not path_or_uri.endswith("://") else path_or_uri
    return os.path.abspath(os.path.expanduser(path_or_uri))


def resolve(uri: str, relative_to: str) -> str:
    """An absolute address for `uri` as written in the manifest file `relative_to` (itself an absolute URI).

    Raises ValueError for schemes that are not allowed and for local paths in a manifest that is not local.
    """
    _refuse_chain(uri)
    if "://" in uri:
        _scheme(uri)
        return uri
    scheme, folder, top = _place(relative_to)
    if uri.startswith("/"):
        if scheme != "file":
            raise ValueError(f"{uri!r} is a path on one machine, but the manifest is at {scheme}://; write a full URI")
        return uri
    path = posixpath.normpath(posixpath.join(folder, uri))
    if scheme not in ("file", "memory") and not path.startswith(f"{top}/"):
        raise ValueError(f"{redact(uri)!r} leads out of {redact(f'{scheme}://{top}')}; write a full URI")
    return path if scheme == "file" else f"{scheme}://{path}"


@lru_cache(16)
def _place(file: str) -> tuple[str, str, str]:
    """Scheme and folder of a manifest's file, and its bucket, container or host, empty where there is none."""
    scheme, base = _split(file)
    return scheme, posixpath.dirname(base), base.split("/")[0]


def read_bytes(uri: str, limit: int = MAX_BYTES) -> bytes:
    """A whole object. Raises OSError when it cannot be had, ValueError when it is larger than `limit` bytes."""
    fs, path = open_store(uri)
    if _is_http(fs):
        return http_client.read(path, limit)
    if _is_local(fs) and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is a folder, or no plain file")  # a pipe or device might never end
    data = _patiently(fs, lambda: _read_up_to(fs, path, limit + 1))
    if len(data) > limit:
        raise ValueError(f"{redact(uri)} has more than {limit:,} bytes")
    return data


def open_for_reading(uri: str) -> AbstractContextManager[IO[bytes]]:
    """A seekable file handle that fetches what is read, for Parquet."""
    fs, path = open_store(uri, repeats=True)
    handle: AbstractContextManager[IO[bytes]] = _patiently(fs, lambda: fs.open(path, "rb"))
    return handle


def match(uri: str, suffix: str) -> list[str]:
    """Sorted URIs of a file, of all files with this suffix in a folder and its subfolders, or of a glob's matches.

    Names beginning with `_` or `.` are bookkeeping of other tools and left out, except when named outright.
    """
    fs, path = open_store(uri, repeats=True)
    if any(c in path for c in "*?["):
        found = fs.glob(path)
    elif fs.isdir(path):
        root = path.rstrip("/") + "/"
        inside = (name for name in fs.find(path) if name.endswith(suffix))
        found = [name for name in inside if not any(part[:1] in "._" for part in name[len(root) :].split("/"))]
    else:
        found = [path] if fs.isfile(path) else []
    return sorted(_address(uri, name) for name in found)


@dataclass(frozen=True)
class ConceptFolder:
    """Relative paths of all that one concept produces under one fingerprint."""

    concept_id: str
    fingerprint: str

    @property
    def root(self) -> str:
        return f"concepts/{self.concept_id}/{self.fingerprint}"

    @property
    def embedding(self) -> str:
        """The format any common tool loads; other formats lie next to it."""
        return f"{self.root}/learned_embeds.safetensors"

    @property
    def adapter(self) -> str:
        """Of the text encoder; only if the concept was learned with one."""
        return f"{self.root}/adapter.safetensors"

    @property
    def grid(self) -> str:
        return f"{self.root}/grid.png"

    @property
    def curve(self) -> str:
        return f"{self.root}/curve.parquet"

    @property
    def checkpoint(self) -> str:
        """Exists while the concept is being learned."""
        return f"{self.root}/checkpoint.safetensors"

    @property
    def record(self) -> str:
        """Written last: it exists when everything else does."""
        return f"{self.root}/record.json"

    @property
    def failure(self) -> str:
        """The last failed attempt; it never counts as done."""
        return f"{self.root}/failure.json"

    @property
    def log(self) -> str:
        """What happened, attempt by attempt."""
        return f"{self.root}/log.jsonl"

    @property
    def ladder(self) -> str:
        """Exists while a concept below the gate waits to be tried again."""
        return f"{self.root}/ladder.json"

    def file(self, name: str) -> str:
        return f"{self.root}/{name}"

    @classmethod
    def of(cls, path: str) -> ConceptFolder | None:
        """The folder that a path of a listing lies in; None for anything that is not a concept's file."""
        parts = path.split("/")
        return cls(parts[1], parts[2]) if len(parts) == 4 and parts[0] == "concepts" else None


@dataclass(frozen=True)
class RunStore:
    """The objects of one run, by path relative to its root. Pickles as its URI."""

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", absolute(self.root))

    @property
    def is_remote(self) -> bool:
        """Whether every request costs money and milliseconds."""
        return self.root.partition("://")[0] not in ("file", "memory") and "://" in self.root

    def uri(self, path: str) -> str:
        return f"{self.root}/{path}"

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object at once: a reader sees the old one or the new one, never a part."""
        fs, full = self._locate(path)
        if _is_local(fs):
            disk.put(Path(full), data)
        else:
            _patiently(fs, lambda: fs.pipe_file(full, data))

    def put_checked(self, path: str, data: bytes) -> str:
        """The same, and make sure that it is there: S3 tells the hash of what it holds, elsewhere it is read back.
        Returns its SHA-256. Raises OSError if anything else is there."""
        fs, full = self._locate(path)
        held = ""
        if is_s3(fs):
            held = s3.put_hashed(fs, full, data)
        else:
            self.put(path, data)
        if held != hashlib.md5(data, usedforsecurity=False).hexdigest() and (back := self.get(path)) != data:
            raise OSError(f"{self.uri(path)}: {len(data)} bytes were written, {len(back)} others read back")
        return hashlib.sha256(data).hexdigest()

    def put_if(self, path: str, data: bytes, tag: str) -> str:
        """Put an object only if the one there has this tag, or if "" none is there; returns the new one's tag.

        Raises FileExistsError if it is not so. Of several at the same time one succeeds, on S3 and local disks; other
        stores are looked at first, and that is all."""
        fs, full = self._locate(path)
        if is_s3(fs):
            return s3.put_if(fs, full, data, tag)
        with disk.alone(Path(full).parent) if _is_local(fs) else contextlib.nullcontext():
            found = self.get_tagged(path)[1] if self.exists(path) else ""
            if found != tag:
                raise FileExistsError(self.uri(path))
            self.put(path, data)
        return hashlib.sha256(data).hexdigest()

    def get_tagged(self, path: str) -> tuple[bytes, str]:
        """An object and what `put_if` knows it by. Raises FileNotFoundError."""
        fs, full = self._locate(path)
        if is_s3(fs):  # the tag first: if it is another's by then, no put can succeed with it
            tag = s3.tag(fs, full)
            return self.get(path), tag
        data = self.get(path)
        return data, hashlib.sha256(data).hexdigest()

    def get(self, path: str) -> bytes:
        """Raises FileNotFoundError when there is none."""
        fs, full = self._locate(path)
        data: bytes = _patiently(fs, lambda: fs.cat_file(full, **_one_request(fs)))
        return data

    def get_many(self, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        """Many small objects, fetched side by side; one that cannot be had is given as its error."""
        names = list(paths)
        if not names:
            return {}
        fs, _ = self._locate(names[0])
        wanted = {name: self._locate(name)[1] for name in names}
        got: dict[str, bytes | OSError] = {}

        def fetch() -> None:
            """What has not come yet; what cannot be had is kept as its error, in case it never comes."""
            left = {name: full for name, full in wanted.items() if not isinstance(got.get(name), bytes)}
            results = fs.cat_ranges(list(left.values()), None, None, on_error="return", **_one_request(fs))
            passing = None
            for name, result in zip(left, results, strict=True):
                if isinstance(result, BaseException):
                    passing = result if retries.is_retryable(result) else passing
                    if passing is not result and not isinstance(result, OSError):
                        raise result
                    result = result if isinstance(result, OSError) else OSError(str(result))
                got[name] = result
            if passing is not None:
                raise passing

        with contextlib.suppress(StoreFailed):
            _patiently(fs, fetch)
        return got

    def exists(self, path: str) -> bool:
        fs, full = self._locate(path)
        return bool(_patiently(fs, lambda: fs.exists(full)))

    def delete(self, path: str) -> None:
        """Nothing happens when there is none."""
        fs, full = self._locate(path)
        try:
            _patiently(fs, lambda: fs.rm_file(full))
        except FileNotFoundError:
            return

    def scan(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(path, bytes) of everything under a folder, streamed; a request per 1,000 objects on S3, never one each."""
        return ((path, size) for path, size, _ in self.scan_dated(prefix))

    def scan_dated(self, prefix: str = "") -> Iterator[tuple[str, int, float]]:
        """The same with the time of writing by the store's clock, in seconds since 1970; 0 where it tells none."""
        fs, full = self._locate(prefix)
        base = len(self._locate("")[1].rstrip("/")) + 1
        if is_s3(fs):
            bucket, _, key = full.partition("/")
            entries = s3.scan(fs, bucket, f"{key}/" if key else "")
            found = ((f"{bucket}/{name}", size, written) for name, size, _, written in entries)
        else:
            found = (
                (name, info["size"], s3.written(info)) for name, info in _patiently(fs, lambda: _find(fs, full)).items()
            )
        for name, size, written in found:
            if not name.endswith("/") and disk.TEMPORARY not in name:
                yield name[base:], size, written

    def list(self, prefix: str = "") -> dict[str, int]:
        """The same, all at once: path -> bytes."""
        return dict(self.scan(prefix))

    def _locate(self, path: str) -> tuple[Any, str]:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path inside the run at {self.root}")
        fs, full = open_store(f"{self.root}/{path}" if path else self.root)
        return fs, full


def _read_up_to(fs: Any, path: str, limit: int) -> bytes:
    """One request on an object store, whatever the size."""
    try:
        data: bytes = fs.cat_file(path, start=0, end=limit)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except OSError:
        if fs.size(path) == 0:  # a range of an empty object is an error on S3
            return b""
        raise
    return data


def _find(fs: Any, path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = fs.find(path, detail=True)
    except FileNotFoundError:
        return {}
    return found


def open_store(uri: str, *, repeats: bool = False) -> tuple[Any, str]:
    """The fsspec instance of this process and the path in its terms. `repeats`: its client repeats calls that fail for
    a moment; for libraries, and for calls that `retries` does not make."""
    _refuse_chain(uri)
    is_single = not repeats and _scheme(uri) in ("s3", "s3a")
    fs, path = fsspec.url_to_fs(uri, use_listings_cache=False, **(s3.single_tries() if is_single else {}))
    if is_single:
        fs.retries = 1
    return fs, path


def hand_over(uri: str) -> tuple[Any, str]:
    """The same for a library that takes instances along into other processes: with credentials as they are now."""
    fs, path = open_store(uri, repeats=True)
    if is_s3(fs):
        s3.renew(fs)
    return fs, path


def _patiently(fs: Any, call: Callable[[], T]) -> T:
    """On a store at the end of a network, again and again (`retries`)."""
    if _is_local(fs) or "memory" in _protocols(fs):
        return call()
    return retries.with_retries(call, partial(s3.renew, fs) if is_s3(fs) else None)


def _refuse_chain(uri: str) -> None:
    if "::" in uri:
        raise ValueError(f"{redact(uri)!r} is a chained URL; name the object itself")


def _scheme(uri: str) -> str:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise ValueError(f"{redact(uri)!r} begins with {scheme}://; allowed are {', '.join(SCHEMES)}")
    return scheme


def _split(uri: str) -> tuple[str, str]:
    return _scheme(uri), uri.partition("://")[2] if "://" in uri else uri


def _address(like: str, path: str) -> str:
    """A path in a store's own terms as a URI with the scheme of `like`."""
    if "://" in path:  # http keeps whole URLs
        return path
    scheme = _scheme(like)
    return path if scheme == "file" else f"{scheme}://{path.lstrip('/')}"


def _is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def is_s3(fs: Any) -> bool:
    return "s3" in _protocols(fs)


def _is_http(fs: Any) -> bool:
    return "http" in _protocols(fs)


def _one_request(fs: Any) -> dict[str, int]:
    """s3fs asks for the size before every read unless told not to split it."""
    return {"max_concurrency": 1} if is_s3(fs) else {}


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
