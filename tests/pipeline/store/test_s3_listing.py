"""Listings read by several threads: every object once, whatever the keys look like and however the server sorts."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest

from pipeline.store import s3_listing
from pipeline.store.addresses import open_filesystem
from pipeline.store.s3 import Page, list_page
from pipeline.store.s3_listing import THREADS, divide, list_pages
from tests.pipeline.s3_memory import S3Memory
from tests.pipeline.s3_server import S3Server

FILES = ("curve.parquet", "grid.png", "record.json")


def keys_of(ids: list[str]) -> list[str]:
    numbers = random.Random(0)
    folders = [f"{name}/{numbers.randbytes(4).hex()}" for name in ids]
    return sorted(f"concepts/{folder}/{file}" for folder in folders for file in FILES)


def list_keys(fs: Any, bucket: str = "bucket") -> list[str]:
    return [key for page in list_pages(fs, bucket, "concepts/") for key in page.keys]


LAYOUTS = {
    "numbers in a row": keys_of([f"sku-{number:07d}" for number in range(1500)]),
    "random": keys_of([random.Random(number).randbytes(6).hex() for number in range(1500)]),
    "one id begins another": keys_of(["a" * n + end for n in range(1, 25) for end in ("", "-b", ".b", "_b", "0", "B")]),
    "most of one kind": keys_of([f"chair.{number}" for number in range(1400)] + ["A", "z", "zebra", "0", "-"]),
    "beyond the basic plane": [f"concepts/{'🐈' * n}é/{number:03d}" for n in range(4) for number in range(200)],
    "one folder": [f"concepts/one/{number:05d}" for number in range(1500)],
}


class Requests:
    """Listing requests of the division, with small pages: how many there were, and how many at a time."""

    def __init__(self, page: int) -> None:
        self.count = 0
        self.at_a_time = 0
        self.most_at_a_time = 0
        self.send = list_page
        self._page = page
        self._lock = threading.Lock()

    def list_page(self, *place: Any, **options: Any) -> tuple[Page, str]:
        with self._lock:
            self.count += 1
            self.at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        try:
            return self.send(*place, **{"MaxKeys": self._page, **options})
        finally:
            with self._lock:
                self.at_a_time -= 1


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    found = Requests(page=20)
    monkeypatch.setattr(s3_listing, "list_page", found.list_page)
    monkeypatch.setattr(s3_listing, "PAGES_ALONE", 4)
    return found


def let_meet(number: int, requests: Requests) -> None:
    """Let the first requests of a listing's threads go on only when so many are under way."""
    together, begun, send = threading.Barrier(number), itertools.count(), requests.send

    def waiting(*place: Any, **options: Any) -> tuple[Page, str]:
        if threading.current_thread().name == "listing" and next(begun) < number:
            together.wait(120)
        return send(*place, **options)

    requests.send = waiting


@pytest.fixture
def fill(s3_memory: S3Memory) -> Callable[[list[str]], Any]:
    def fill(keys: list[str]) -> Any:
        others = ["concept", "concepts", "concepts-of-old/a", "run.json"]
        s3_memory.objects.update({f"bucket/{key}": key.encode() for key in [*keys, *others]})
        return open_filesystem("s3://bucket/")[0]

    return fill


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_object_is_listed_once(layout: str, fill: Callable[[list[str]], Any], requests: Requests) -> None:
    keys = LAYOUTS[layout]
    fs = fill(keys)
    found = list(list_pages(fs, "bucket", "concepts/"))
    assert sorted(key for page in found for key in page.keys) == sorted(keys)
    assert all(list(page.sizes) == [len(key.encode()) for key in page.keys] for page in found)
    pages = len(keys) / 20
    assert requests.count < 4 * pages + 20
    assert 1 <= requests.most_at_a_time <= THREADS


def test_a_long_listing_is_read_by_several_threads(fill: Callable[[list[str]], Any], requests: Requests) -> None:
    fs = fill(LAYOUTS["random"])
    let_meet(3, requests)
    assert len(list_keys(fs)) == len(LAYOUTS["random"])
    assert 3 <= requests.most_at_a_time <= THREADS


def test_a_short_listing_is_read_in_order_and_not_divided(fill: Callable[[list[str]], Any], requests: Requests) -> None:
    keys = LAYOUTS["random"][:60]
    fs = fill(keys)
    assert list_keys(fs) == keys
    assert requests.count == 3


def test_keys_are_divided_by_the_character_in_which_they_differ(
    fill: Callable[[list[str]], Any], requests: Requests
) -> None:
    fs = fill(LAYOUTS["numbers in a row"])
    after = next(key for key in LAYOUTS["numbers in a row"] if "sku-0000512" in key)
    parts = divide(fs, "bucket", "concepts/", after)
    assert parts == [("concepts/sku-0000", after), ("concepts/sku-0001", "")]
    assert requests.count < 20


def test_an_error_reaches_the_reader(fill: Callable[[list[str]], Any], requests: Requests) -> None:
    fs = fill(LAYOUTS["random"])
    request = requests.list_page

    def failing(*place: Any, **options: Any) -> tuple[Page, str]:
        if threading.current_thread().name == "listing" and requests.count > 30:
            raise PermissionError("AccessDenied")
        return request(*place, **options)

    s3_listing.list_page = failing  # type: ignore[assignment]
    with pytest.raises(PermissionError, match="AccessDenied"):
        list_keys(fs)
    assert_threads_end()


def test_a_listing_that_is_not_read_to_its_end_leaves_no_thread(
    fill: Callable[[list[str]], Any], requests: Requests
) -> None:
    fs = fill(LAYOUTS["random"])
    listed = list_pages(fs, "bucket", "concepts/")
    for _ in range(10):
        next(listed)
    listed.close()  # type: ignore[attr-defined]
    assert requests.most_at_a_time <= THREADS
    assert_threads_end()


def test_a_store_that_ignores_where_to_start_is_read_page_by_page(
    fill: Callable[[list[str]], Any], requests: Requests
) -> None:
    fs = fill(LAYOUTS["random"])
    request = requests.list_page

    def ignoring(*place: Any, **options: Any) -> tuple[Page, str]:
        options.pop("StartAfter", None)
        return request(*place, **options)

    s3_listing.list_page = ignoring  # type: ignore[assignment]
    assert list_keys(fs) == LAYOUTS["random"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["numbers in a row", "one id begins another", "beyond the basic plane"])
def test_every_object_of_a_real_server_is_listed_once(
    layout: str, bucket: str, s3_server: S3Server, requests: Requests
) -> None:
    """The server sorts folder by folder, `a/x` before `a-b/x`, which S3 lists the other way round."""
    keys = LAYOUTS[layout][:600]
    name = bucket.removeprefix("s3://")
    fsspec.filesystem("s3", **s3_server.options).pipe({f"{name}/{key}": b"x" for key in [*keys, "concepts-of-old/a"]})
    fs = open_filesystem(bucket)[0]
    let_meet(2, requests)
    assert sorted(list_keys(fs, name)) == sorted(keys)
    assert 1 < requests.most_at_a_time <= THREADS


def assert_threads_end() -> None:
    """Wait until no thread of a listing is left."""

    def living() -> Iterator[threading.Thread]:
        return (thread for thread in threading.enumerate() if thread.name == "listing")

    deadline = time.monotonic() + 60
    while any(living()):
        assert time.monotonic() < deadline, "threads of the listing are left"
        time.sleep(0.05)
