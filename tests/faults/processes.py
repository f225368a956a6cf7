"""Find and kill processes that descend from the test's own process, and no others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path


def processes(entry: str) -> Iterator[tuple[int, str]]:
    """Yield (process id, text of an entry under /proc) of all living processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / entry).read_text()


def descendants(title: str) -> list[int]:
    """Return the ids of the descendants that Ray has given this title, such as `ray::ModelActor`."""
    parents = {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in processes("stat")}
    titled = [pid for pid, found in processes("cmdline") if found.startswith(title)]

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid in titled if is_ours(pid)]


def kill(pid: int) -> None:
    """Send SIGKILL, unless the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
