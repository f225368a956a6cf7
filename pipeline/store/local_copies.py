"""Keep copies of large objects on this machine's disk, for libraries that read files alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.store.addresses import call_with_retries, open_filesystem
from pipeline.store.disk import TEMPORARY, exclusive_lock

_VERSION = ("ETag", "etag", "size", "mtime", "LastModified", "updated", "created")
"""Entries of fsspec's `info` that change when an object does, in the words of its file systems."""


def local_copy(uri: str) -> Path:
    """Return the path of an object's copy on this machine's disk, fetched if this version of it is not there.

    Copies lie in `textual-inversion/` of $XDG_CACHE_HOME, else of ~/.cache, and are never deleted. One process at a
    time fetches an object. Raises OSError if it cannot be read, ValueError for an address that is not allowed.
    """
    fs, path = open_filesystem(uri, client_retries=True)
    info = call_with_retries(fs, lambda: fs.info(path))
    folder = _cache() / _name(uri, info)
    copy = folder / PurePosixPath(path).name
    with exclusive_lock(folder):
        if not copy.exists():
            handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
            os.close(handle)
            try:
                call_with_retries(fs, lambda: fs.get_file(path, temporary))
                os.replace(temporary, copy)
            finally:
                Path(temporary).unlink(missing_ok=True)
    return copy


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textual-inversion"


def _name(uri: str, info: dict[str, Any]) -> str:
    """Return a name that an object's address and version have alone."""
    version = [uri, *(f"{name}={info.get(name)}" for name in _VERSION)]
    return hashlib.blake2b("\n".join(version).encode(), digest_size=16).hexdigest()
