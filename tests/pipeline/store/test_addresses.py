from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store.addresses import absolute, find_files, open_for_reading, read_beginning, read_bytes, resolve
from pipeline.store.storage import RunStore


@pytest.mark.parametrize(
    ("uri", "manifest", "expected"),
    [
        ("a/1.png", "/data/m.parquet", "/data/a/1.png"),
        ("../1.png", "/data/sets/m.parquet", "/data/1.png"),
        ("/abs/1.png", "/data/m.parquet", "/abs/1.png"),
        ("a b/ü%20.png", "file:///data/m.parquet", "/data/a b/ü%20.png"),
        ("a/1.png", "s3://bucket/sets/m.parquet", "s3://bucket/sets/a/1.png"),
        ("../photos/1.png", "s3://bucket/sets/m.parquet", "s3://bucket/photos/1.png"),
        ("1.png", "memory://m.parquet", "memory://1.png"),
        ("s3://other/1.png", "/data/m.parquet", "s3://other/1.png"),
        ("https://host/1.png", "s3://bucket/m.parquet", "https://host/1.png"),
    ],
)
def test_addresses_are_relative_to_the_manifest(uri: str, manifest: str, expected: str) -> None:
    assert resolve(uri, manifest) == expected


@pytest.mark.parametrize(
    ("uri", "manifest", "message"),
    [
        ("ssh://host/1.png", "/m.parquet", "ssh://"),
        ("simplecache::s3://b/1.png", "/m.parquet", "is a chained URL"),
        ("/abs/1.png", "s3://bucket/m.parquet", "path on one machine"),
        ("http:/u:hunter2@host/1.png", "/m.parquet", r"'http:/\*\*\*@host/1.png' lacks the slashes .*; write http://"),
        ("s3:bucket/1.png", "/m.parquet", "lacks the slashes"),
        ("../../1.png", "s3://bucket/a/m.parquet", "leads out of s3://bucket"),
        ("../../other/1.png", "s3://bucket/a/m.parquet", "leads out of s3://bucket"),
    ],
)
def test_addresses_that_are_refused(uri: str, manifest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(uri, manifest)


def test_photos_are_read_whole_but_not_without_limit(root: str) -> None:
    store = RunStore(root)
    store.put("photo", b"12345")
    store.put("empty", b"")
    assert read_bytes(store.uri("photo"), limit=5) == b"12345"
    assert read_bytes(store.uri("empty")) == b""
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bytes(store.uri("photo"), limit=4)
    with pytest.raises(FileNotFoundError):
        read_bytes(store.uri("absent"))


def test_the_beginning_of_an_object_is_read_without_the_rest(root: str) -> None:
    store = RunStore(root)
    store.put("large", b"12345")
    store.put("empty", b"")
    assert read_beginning(store.uri("large"), 3, limit=4) == b"123"
    assert read_beginning(store.uri("large"), 9) == b"12345"
    assert read_beginning(store.uri("empty"), 3) == b""
    with pytest.raises(FileNotFoundError):
        read_beginning(store.uri("absent"), 3)


@pytest.mark.parametrize("path", ["/proc/self/environ", "/dev/zero", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_files_of_the_kernel_are_not_read(path: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    for address in (path, str(tmp_path / "link")):
        with pytest.raises(ValueError, match="no plain file"):
            read_bytes(address)
        with pytest.raises(ValueError, match="no plain file"):
            open_for_reading(address)


@pytest.mark.parametrize("uri", ["ssh://host/x", "file:///x::s3://y", "zip://a::file://b"])
def test_other_schemes_and_chains_are_not_opened(uri: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are|chained"):
        read_bytes(uri)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Ignores ranges, as plain servers do."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/photo" else 404)
        self.end_headers()
        self.wfile.write(b"12345")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_photos_on_the_web(web: str) -> None:
    assert read_bytes(f"{web}/photo", limit=5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bytes(f"{web}/photo", limit=4)
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{web}/absent")
    assert read_beginning(f"{web}/photo", 3) == b"12345"


def test_files_are_matched_by_name_folder_or_glob(root: str) -> None:
    store = RunStore(root)
    for path in ("b.parquet", "a.parquet", "sub/c.parquet", "_meta.parquet", "_temporary/d.parquet", "notes.txt"):
        store.put(path, b"x")
    found = [store.uri(path) for path in ("a.parquet", "b.parquet", "sub/c.parquet")]
    assert find_files(store.root, ".parquet") == found
    assert find_files(store.uri("?.parquet"), ".parquet") == found[:2]
    assert find_files(store.uri("b.parquet"), ".parquet") == found[1:2]
    assert find_files(store.uri("absent.parquet"), ".parquet") == []
    with open_for_reading(found[0]) as file:
        assert file.read() == b"x"


def test_absolute_keeps_uris_and_roots_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("s3://bucket/x/") == "s3://bucket/x"
    assert absolute("memory://") == "memory://"
    assert absolute("x/y") == str(tmp_path / "x" / "y")
    with pytest.raises(ValueError, match="allowed are"):
        absolute("ftp://host/x")
