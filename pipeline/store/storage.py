"""A run's own storage: the layout of its objects, and how they are put, got and listed.

Local disk, `memory://` and object stores look alike. Objects are put whole, and no listing is answered from a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.store import disk, retries, s3, s3_listing
from pipeline.store.addresses import absolute, call_with_retries, is_local, is_s3, open_filesystem
from pipeline.store.errors import StoreFailed, describe_error

RECORD = "record.json"
FAILURE = "failure.json"
LADDER = "ladder.json"


class StoredObject(NamedTuple):
    """One object in a listing."""

    path: str
    num_bytes: int
    written_at: float
    """Time of writing by the store's clock, in seconds since 1970; 0 where the store tells none."""
    version: str
    """Text that changes with the content: the entity tag, on S3 mostly the content's MD5; the time of writing where the
    store tells no tag; empty where it tells neither."""


class StoredPage(NamedTuple):
    """Some objects of a listing, column by column."""

    paths: Sequence[str]
    sizes: Sequence[int]
    """Bytes of each object."""
    versions: Sequence[str]
    """See `StoredObject`."""
    times: Sequence[Any]
    """Times of writing, for `s3.timestamp`."""

    def objects(self) -> Iterator[StoredObject]:
        return map(StoredObject, self.paths, self.sizes, map(s3.timestamp, self.times), self.versions)


@dataclass(frozen=True)
class ConceptFolder:
    """Paths, relative to the run's root, of all objects that one concept produces under one fingerprint."""

    concept_id: str
    fingerprint: str

    @property
    def root(self) -> str:
        return f"concepts/{self.concept_id}/{self.fingerprint}"

    @property
    def embedding(self) -> str:
        """Embedding in the format any common tool loads; other formats lie next to it."""
        return f"{self.root}/learned_embeds.safetensors"

    @property
    def adapter(self) -> str:
        """Adapter of the text encoder; absent unless the concept was learned with one."""
        return f"{self.root}/adapter.safetensors"

    @property
    def grid(self) -> str:
        return f"{self.root}/grid.png"

    @property
    def curve(self) -> str:
        return f"{self.root}/curve.parquet"

    @property
    def previews(self) -> str:
        """Strip of previews; absent unless previews were drawn. No record lists it, so that it can be lost."""
        return f"{self.root}/previews.png"

    @property
    def checkpoint(self) -> str:
        """Checkpoint, which exists while the concept is being learned."""
        return f"{self.root}/checkpoint.safetensors"

    @property
    def record(self) -> str:
        """Record, written last: where it exists, everything else does."""
        return f"{self.root}/{RECORD}"

    @property
    def failure(self) -> str:
        """Record of the last failed attempt; it never counts as done."""
        return f"{self.root}/{FAILURE}"

    @property
    def log(self) -> str:
        """Log of the concept's events, attempt by attempt."""
        return f"{self.root}/log.jsonl"

    @property
    def ladder(self) -> str:
        """Gate retries still to come; exists while a concept below the gate waits to be tried again."""
        return f"{self.root}/{LADDER}"

    def file(self, name: str) -> str:
        return f"{self.root}/{name}"

    @classmethod
    def from_path(cls, path: str) -> ConceptFolder | None:
        """Return the folder of a listed path, or None if the path is not a concept's file."""
        parts = path.split("/")
        return cls(parts[1], parts[2]) if len(parts) == 4 and parts[0] == "concepts" else None


@dataclass(frozen=True)
class RunStore:
    """Objects of one run, by path relative to its root. Pickles as its URI."""

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", absolute(self.root))

    def __reduce__(self) -> tuple[type[RunStore], tuple[str]]:
        return RunStore, (self.root,)

    @property
    def is_remote(self) -> bool:
        """True if every request costs money and milliseconds."""
        return self.root.partition("://")[0] not in ("file", "memory") and "://" in self.root

    def uri(self, path: str) -> str:
        return f"{self.root}/{path}"

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object at once: a reader sees the old one or the new one, never a part."""
        fs, full = self._locate(path)
        if is_local(fs):
            disk.put(Path(full), data)
        else:
            call_with_retries(fs, lambda: fs.pipe_file(full, data))

    def put_checked(self, path: str, data: bytes) -> str:
        """Write a whole object, check that the store holds exactly these bytes, and return their SHA-256.

        S3 answers with the hash of what it holds; where it differs, and elsewhere, the object is read back. Raises
        OSError if it differs.
        """
        fs, full = self._locate(path)
        is_checked = False
        if is_s3(fs):
            is_checked = s3.put_hashed(fs, full, data) == hashlib.md5(data, usedforsecurity=False).hexdigest()
        else:
            self.put(path, data)
        if not is_checked and (back := self.get(path)) != data:
            raise OSError(f"{self.uri(path)}: {len(data)} bytes were written, {len(back)} others read back")
        return hashlib.sha256(data).hexdigest()

    def put_if_match(self, path: str, data: bytes, etag: str) -> str:
        """Put an object only if the present one has this entity tag, or if `etag` is "" and none is present; return the
        tag of the new one.

        Raises FileExistsError otherwise. Of several concurrent calls one succeeds on S3 and local disks; other stores
        are only looked at first.
        """
        fs, full = self._locate(path)
        if is_s3(fs):
            return s3.put_if_match(fs, full, data, etag)
        with disk.exclusive_lock(Path(full).parent) if is_local(fs) else contextlib.nullcontext():
            present = self.get_with_etag(path)[1] if self.exists(path) else ""
            if present != etag:
                raise FileExistsError(self.uri(path))
            self.put(path, data)
        return hashlib.sha256(data).hexdigest()

    def get_with_etag(self, path: str) -> tuple[bytes, str]:
        """Return an object and its entity tag for `put_if_match`. Raises FileNotFoundError if there is none."""
        fs, full = self._locate(path)
        if is_s3(fs):  # the tag first: if another process puts in between, no put can succeed with the old tag
            etag = s3.get_etag(fs, full)
            return self.get(path), etag
        data = self.get(path)
        return data, hashlib.sha256(data).hexdigest()

    def get(self, path: str) -> bytes:
        """Read an object. Raises FileNotFoundError if there is none."""
        fs, full = self._locate(path)
        data: bytes = call_with_retries(fs, lambda: fs.cat_file(full, **_single_request(fs)))
        return data

    def get_many(self, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        """Read many small objects concurrently; the value of one that cannot be read is its error."""
        names = list(paths)
        if not names:
            return {}
        fs, _ = self._locate(names[0])
        full_paths = {name: self._locate(name)[1] for name in names}
        results: dict[str, bytes | OSError] = {}

        def get_missing() -> None:
            """Get what is still missing; raise a retryable error if there is any, after storing each error."""
            missing = {name: full for name, full in full_paths.items() if not isinstance(results.get(name), bytes)}
            answers = fs.cat_ranges(list(missing.values()), None, None, on_error="return", **_single_request(fs))
            retryable = None
            for name, answer in zip(missing, answers, strict=True):
                if isinstance(answer, BaseException):
                    retryable = answer if retries.is_retryable(answer) else retryable
                    answer = answer if isinstance(answer, OSError) else OSError(describe_error(answer))
                results[name] = answer
            if retryable is not None:
                raise retryable

        with contextlib.suppress(StoreFailed):  # each object's own error is in `results`
            call_with_retries(fs, get_missing)
        return results

    def exists(self, path: str) -> bool:
        fs, full = self._locate(path)
        return bool(call_with_retries(fs, lambda: fs.exists(full)))

    def delete(self, path: str) -> None:
        """Delete an object; do nothing if there is none."""
        fs, full = self._locate(path)
        try:
            call_with_retries(fs, lambda: fs.rm_file(full))
        except FileNotFoundError:
            return

    def check_writable(self) -> None:
        """Raise OSError if the run's folder on a local disk could not be written; other stores are not asked."""
        fs, full = self._locate("")
        if is_local(fs):
            disk.check_writable(Path(full))

    def delete_partial_files(self, older_than_s: float) -> None:
        """Delete temporary files that killed processes left on a local disk; other stores have none."""
        fs, full = self._locate("")
        if is_local(fs):
            disk.delete_partial_files(Path(full), older_than_s)

    def scan(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield (path, bytes) of every object under a folder; see `scan_objects`."""
        return ((each.path, each.num_bytes) for each in self.scan_objects(prefix))

    def scan_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield every object under a folder, in no particular order; see `scan_pages`."""
        for page in self.scan_pages(prefix):
            yield from page.objects()

    def scan_pages(self, prefix: str = "") -> Iterator[StoredPage]:
        """Yield every object under a folder, in no particular order. On S3 one request lists 1,000 objects, and several
        threads share a long listing."""
        fs, full = self._locate(prefix)
        base = len(self._locate("")[1].rstrip("/")) + 1
        if is_s3(fs):
            bucket, _, key = full.partition("/")
            base -= len(bucket) + 1
            pages = s3_listing.list_pages(fs, bucket, f"{key}/" if key else "")
        else:
            pages = iter([_page(call_with_retries(fs, lambda: _find(fs, full)))])
        for page in pages:
            is_object = [not name.endswith("/") and disk.TEMPORARY not in name for name in page.keys]
            keys, sizes, etags, times = (list(compress(column, is_object)) for column in page)
            if not all(etags):
                etags = [etag or str(s3.timestamp(time) or "") for etag, time in zip(etags, times, strict=True)]
            yield StoredPage([name[base:] for name in keys], sizes, etags, times)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return path -> bytes of every object under a folder."""
        return dict(self.scan(prefix))

    def _locate(self, path: str) -> tuple[Any, str]:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path inside the run at {self.root}")
        fs, root = self._opened
        return fs, f"{root.rstrip('/')}/{path}" if path else root

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """This process's file system, and the root in its terms. Looking it up takes 30 µs of CPU, and a concept has
        a dozen calls."""
        return open_filesystem(self.root)


def _find(fs: Any, path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = fs.find(path, detail=True)
    except FileNotFoundError:
        return {}
    return found


def _page(found: Mapping[str, Any]) -> s3.Page:
    """Return what `_find` found, whose stores tell no entity tags."""
    infos = found.values()
    return s3.Page(
        list(found), [info["size"] for info in infos], [""] * len(found), [s3.modification_time(info) for info in infos]
    )


def _single_request(fs: Any) -> dict[str, int]:
    """Return options that read an object in one request: s3fs asks for the size first unless told not to split."""
    return {"max_concurrency": 1} if is_s3(fs) else {}
