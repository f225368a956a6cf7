"""Local disks: write files that are either complete or absent, and lock folders against other processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".partial-"
"""Prefix in the names of files that are still being written."""


def put(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, and rename it once its bytes are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a record must not survive a crash that loses the files it names
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raise the OSError that writing into a folder would meet, without writing: something else than a folder is in its
    place, or there is no right."""
    present = next(each for each in (folder, *folder.parents) if each.exists())
    if not present.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(present))
    if not os.access(present, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(present))


def delete_partial_files(root: Path, older_than_s: float) -> None:
    """Delete the temporary files below a folder that `put` left because its process was killed. Younger ones stay: they
    may be being written."""
    newest = time.time() - older_than_s
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names if name.startswith(TEMPORARY)):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < newest:
                    path.unlink()


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder against other processes of this machine, and of others where a network file
    system supports locks."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
