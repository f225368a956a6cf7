"""Lookups of content hashes in S3's listings, against a server in memory that counts requests."""

from __future__ import annotations

import hashlib
import logging
import random
from typing import Any

import pytest
from aiohttp import web

from pipeline.store.addresses import open_filesystem
from pipeline.store.s3 import list_page, listed_md5s, modification_time, timestamp
from pipeline.store.s3_listing import list_pages
from tests.pipeline.s3_memory import S3Memory


def fill(server: S3Memory, keys: list[str]) -> Any:
    """Put an object at each key, whose content is the key; return the file system."""
    server.objects.update({f"bucket/{key}": key.encode() for key in keys})
    return open_filesystem("s3://bucket/")[0]


def md5(key: str) -> str:
    return hashlib.md5(key.encode()).hexdigest()


def rows(fs: Any) -> list[tuple[str, int, str, float]]:
    """Return key, size, tag and time of each object of a page."""
    page, token = list_page(fs, "bucket", "photos/")
    assert token == ""
    return list(zip(page.keys, page.sizes, page.etags, map(timestamp, page.times), strict=True))


def test_neighbours_are_found_in_one_page(s3_memory: S3Memory) -> None:
    keys = [f"photos/{i:03d}.png" for i in range(40)]
    fs = fill(s3_memory, keys)
    random.Random(0).shuffle(keys)
    assert listed_md5s(fs, "bucket", keys) == {key: md5(key) for key in keys}
    assert s3_memory.requests["list"] == 1


def test_a_lookup_jumps_over_keys_that_are_not_wanted(s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.pipeline.s3_memory._PAGE", 10)
    keys = [f"photos/{i:03d}.png" for i in range(200)]
    fs = fill(s3_memory, keys)
    wanted = ["photos/003.png", "photos/005.png", "photos/120.png", "photos/199.png"]
    assert listed_md5s(fs, "bucket", wanted) == {key: md5(key) for key in wanted}
    assert s3_memory.requests["list"] == 3  # the first two are on one page
    assert [key for page in list_pages(fs, "bucket", "photos/") for key in page.keys] == keys


def test_absent_keys_are_left_out(s3_memory: S3Memory) -> None:
    fs = fill(s3_memory, ["a/1.png", "a/3.png", "b/ü z.png"])
    wanted = ["a/0.png", "a/1.png", "a/2.png", "b/ü z.png", "c/1.png"]
    assert listed_md5s(fs, "bucket", wanted) == {key: md5(key) for key in ("a/1.png", "b/ü z.png")}
    assert listed_md5s(fs, "bucket", []) == {}


def test_a_bucket_that_cannot_be_listed_is_told_and_gives_nothing(
    s3_memory: S3Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fill(s3_memory, ["a/1.png"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(fs, "call_s3", refuse)
    with caplog.at_level(logging.WARNING):
        assert listed_md5s(fs, "bucket", ["a/1.png"]) == {}
    assert "cannot list s3://bucket/a (AccessDenied): photos there are read instead" in caplog.text


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"mtime": 12.5}, 12.5),
        ({"LastModified": "2026-01-02T00:00:00+00:00"}, 1767312000.0),
        ({"created": None, "updated": "2026-01-02T00:00:00+00:00"}, 1767312000.0),
        ({"size": 3}, 0.0),
    ],
)
def test_each_store_names_the_modification_time_differently(info: dict[str, Any], expected: float) -> None:
    assert modification_time(info) == expected


@pytest.mark.parametrize("encoding", ["", "<EncodingType>url</EncodingType>"])
@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("photos/a b&c<d>\"e'.png", "photos/a b&amp;c&lt;d&gt;&quot;e&apos;.png"),
        ("photos/\U0001f408.png", "photos/\U0001f408.png"),
        ("photos/<Key>x</Key>", "photos/&lt;Key&gt;x&lt;/Key&gt;"),
        ("photos/a b+\N{LATIN SMALL LETTER E WITH ACUTE}.png", "photos/a+b%2B%C3%A9.png"),
    ],
)
def test_a_listing_is_read_as_the_client_reads_it(
    key: str, shown: str, encoding: str, s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fill(s3_memory, [key, "photos/~"])
    monkeypatch.setattr("tests.pipeline.s3_memory.escape", lambda text: shown if text == key else text)
    whole = s3_memory._list

    def answer(*request: Any) -> web.Response:
        text = str(whole(*request).text).replace("<KeyCount>", f"{encoding}<KeyCount>")
        return web.Response(text=text, content_type="application/xml")

    monkeypatch.setattr(s3_memory, "_list", answer)
    quick = rows(fs)
    listed = key if encoding or "%" not in shown else shown
    assert (listed, len(key.encode()), md5(key), 1767323045.0) in quick
    fs.clear_instance_cache()
    monkeypatch.setattr("pipeline.store.s3._read_contents", lambda **_: None)
    again = open_filesystem("s3://bucket/")[0]
    assert again is not fs
    assert rows(again) == quick


OBJECTS = {
    "S3's own": "<Contents><Key>{key}</Key>{time}{tag}<ChecksumAlgorithm>CRC32</ChecksumAlgorithm>"
    "<ChecksumType>FULL_OBJECT</ChecksumType>{size}<StorageClass>STANDARD</StorageClass></Contents>",
    "another order": "<Contents>{size}<Owner><ID>x</ID></Owner>{tag}<Key>{key}</Key>{time}</Contents>",
    "lines": "<Contents>\n  <Key>{key}</Key>\n  {time}\n  {tag}\n  {size}\n</Contents>\n",
    "no tag": "<Contents><Key>{key}</Key>{time}{size}</Contents>",
    "among prefixes": "<Contents><Key>{key}</Key>{time}{tag}{size}</Contents>"
    "<CommonPrefixes><Prefix>p</Prefix></CommonPrefixes>",
    "mixed": "<Contents>{size}<Key>{key}</Key>{time}{tag}</Contents>"
    "<Contents><Key>{key}+</Key>{time}{tag}{size}</Contents>",
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_may_be_written_in_any_way(kind: str, s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fill(s3_memory, [])
    fields = {
        "time": "<LastModified>2026-01-02T03:04:05.000Z</LastModified>",
        "tag": "<ETag>&quot;0123&quot;</ETag>",
        "size": "<Size>12</Size>",
    }
    listed = "".join(OBJECTS[kind].format(key=f"photos/{name}", **fields) for name in "ab")
    text = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
    monkeypatch.setattr(s3_memory, "_list", lambda *_: web.Response(text=text, content_type="application/xml"))
    quick = rows(fs)
    assert quick[0] == ("photos/a", 12, "" if kind == "no tag" else "0123", 1767323045.0)
    fs.clear_instance_cache()
    monkeypatch.setattr("pipeline.store.s3._read_contents", lambda **_: None)
    assert rows(open_filesystem("s3://bucket/")[0]) == quick


_CUT = "<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>photos/a</Key>"
_FIELDS = "<LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>x</ETag><Size>1</Size>"


@pytest.mark.parametrize(
    "answer",
    [
        "<?xml version='1.0'?><Error><Code>InternalError</Code></Error>",
        _CUT,
        f"{_CUT}{_FIELDS}</Contents>",
        f"{_CUT}{_FIELDS}</Contents><Contents><Key>photos/b</Key>{_FIELDS}</Contents><Conte",
    ],
    ids=["an error with status 200", "cut in an object", "cut behind an object", "cut before an object"],
)
def test_an_answer_that_is_no_whole_listing_is_asked_for_again(
    answer: str, s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.retries.FIRST_WAIT_S", 0.0)
    fs = fill(s3_memory, ["photos/a", "photos/b"])
    whole = s3_memory._list
    answers = [lambda *_: web.Response(text=answer, content_type="application/xml"), whole]
    monkeypatch.setattr(s3_memory, "_list", lambda *request: answers.pop(0)(*request))
    page, token = list_page(fs, "bucket", "photos/")
    assert (page.keys, token, answers) == (["photos/a", "photos/b"], "", [])
