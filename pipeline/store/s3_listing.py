"""Listings of many objects on S3, read by several threads at once.

A listing comes in pages of 1,000 keys, each asked for with the last key of the one before: a million concepts of five
objects are 5,000 pages, one after the other. A long listing is therefore divided by prefixes, of which each thread
reads one. The prefixes are those that the keys have, whatever the concept ids look like.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

from pipeline.store.s3 import Page, list_page

THREADS = 8
"""Largest number of pages that are asked for at a time. Reading the answers takes one core by then."""

PAGES_ALONE = 32
"""Pages that a prefix has at least before it is divided, which itself takes up to some twenty requests."""

_LAST = "\U0010ffff"
"""The character that sorts behind all others."""


def list_pages(fs: Any, bucket: str, prefix: str) -> Iterator[Page]:
    """Yield all objects under a prefix, each once, a page at a time; in the order of their keys only up to
    `PAGES_ALONE` pages."""
    start: dict[str, str] = {}
    for number in count(1):
        page, token = list_page(fs, bucket, prefix, **start)
        yield page
        if not token:
            return
        if number == PAGES_ALONE and page.keys and (parts := divide(fs, bucket, prefix, page.keys[-1])):
            yield from _SharedListing(fs, bucket).read(parts)
            return
        start = {"ContinuationToken": token}


def divide(fs: Any, bucket: str, prefix: str, after: str) -> list[tuple[str, str]]:
    """Divide the keys under a prefix that are listed after the key `after` into parts by their next character; a part
    is a prefix and the key after which it begins ("" for the whole prefix).

        after             concepts/chair-0412/9c04.../grid.png
        all that follow   concepts/chair-0...                      the prefix that they share, found by bisection
        parts             concepts/chair-04 (after `after`), concepts/chair-05, ... concepts/chair-09

    Every key is listed under its prefix whatever the order, and the characters are found in the store's own order. That
    only has to keep keys of one prefix together, as also stores do that sort folder by folder. Returns no parts if a
    store does not.
    """

    def first_after(within: str, key: str) -> str | None:
        page, _ = list_page(fs, bucket, within, StartAfter=key, MaxKeys=1)
        return page.keys[0] if page.keys else None

    shared, longest = len(prefix), len(after) - 1
    if longest < shared:  # an object of the prefix's own name
        return []
    while shared < longest:
        middle = (shared + longest + 1) // 2
        if first_after(prefix, after[:middle] + _LAST) is None:
            shared = middle
        else:
            longest = middle - 1
    parts = {after[: shared + 1]: after}
    last = after[: shared + 1]
    while (key := first_after(after[:shared], last + _LAST)) is not None:
        last = key[: shared + 1]
        if last in parts or len(last) == shared:
            return []
        parts[last] = ""
    return list(parts.items())


class _SharedListing:
    """One listing that several threads read."""

    def __init__(self, fs: Any, bucket: str) -> None:
        self._fs = fs
        self._bucket = bucket
        self._parts: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._pages: queue.Queue[Page | Exception | None] = queue.Queue(THREADS)
        """Pages read; an error, or None, is the last."""
        self._lock = threading.Lock()
        self._num_unfinished = 0
        """Parts that wait or are being read."""
        self._is_over = threading.Event()

    def read(self, parts: list[tuple[str, str]]) -> Iterator[Page]:
        """Yield the pages of all parts as they come."""
        self._add(parts)
        for _ in range(THREADS):  # of a process that ends, they must not be waited for
            threading.Thread(target=self._work, name="listing", daemon=True).start()
        try:
            while (page := self._pages.get()) is not None:
                if isinstance(page, Exception):
                    raise page
                yield page
        finally:
            self._is_over.set()
            self._release()

    def _work(self) -> None:
        while (part := self._parts.get()) is not None and not self._is_over.is_set():
            try:
                self._list(*part)
            except Exception as error:  # the reader raises it
                self._put(error)
                return
            if self._finish():
                self._put(None)

    def _list(self, prefix: str, after: str) -> None:
        """Read a part; leave its rest to other threads when some have nothing to do."""
        start = {"StartAfter": after} if after else {}
        for number in count(1):
            page, token = list_page(self._fs, self._bucket, prefix, **start)
            self._put(page)
            if not token or self._is_over.is_set():
                return
            if number % PAGES_ALONE == 0 and page.keys and self._num_unfinished < THREADS:
                parts = divide(self._fs, self._bucket, prefix, page.keys[-1])
                if parts:
                    self._add(parts)
                    return
            start = {"ContinuationToken": token}

    def _add(self, parts: list[tuple[str, str]]) -> None:
        with self._lock:
            self._num_unfinished += len(parts)
        for part in parts:
            self._parts.put(part)

    def _finish(self) -> bool:
        """Count a part as read; return whether it was the last."""
        with self._lock:
            self._num_unfinished -= 1
            is_last = not self._num_unfinished
        if is_last:
            self._release()
        return is_last

    def _release(self) -> None:
        """Let the threads that wait for a part end."""
        for _ in range(THREADS):
            self._parts.put(None)

    def _put(self, page: Page | Exception | None) -> None:
        while not self._is_over.is_set():
            try:
                self._pages.put(page, timeout=1.0)
            except queue.Full:
                continue
            return
