"""Copies of many small objects in one, kept on object stores for speed: each saves a request for every object.

A copy may be deleted, and one that is damaged or cannot be stored costs requests alone. Local disks have none, as a
request costs nothing there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pyarrow as pa

from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)


def read_copy(store: RunStore, path: str, parse: Callable[[bytes], pa.Table]) -> pa.Table | None:
    """Return a copy as `parse` reads it; None on a local disk, where there is none, and where it cannot be read, which
    is logged."""
    if not store.is_remote:
        return None
    try:
        return parse(store.get(path))
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        log.warning("%s is ignored, as it cannot be read: %s", store.uri(path), error)
        return None


def put_copy(store: RunStore, path: str, content: bytes) -> bool:
    """Store a copy and return whether that succeeded. A failure is logged and not raised: the next run reads every
    object by itself."""
    try:
        store.put(path, content)
    except OSError as error:
        log.warning("%s was not stored: %s", store.uri(path), error)
        return False
    return True
