from __future__ import annotations

import http.server
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.store.storage import ConceptFolder, RunStore, absolute, match, open_for_reading, read_bytes, resolve
from tests.pipeline.s3_server import S3Server


def test_objects_are_put_got_listed_and_deleted(root: str) -> None:
    store = RunStore(root)
    assert list(store.scan()) == []
    store.put("a/one.bin", b"1")
    store.put("a/deep/er/two.bin", b"22")
    store.put("ab/three.bin", b"333")
    store.put("a/empty", b"")
    store.put("a/one.bin", b"4444")
    assert store.get("a/one.bin") == b"4444"
    assert store.list("a") == {"a/one.bin": 4, "a/deep/er/two.bin": 2, "a/empty": 0}
    assert store.list() == {**store.list("a"), "ab/three.bin": 3}
    assert store.list("nothing") == {}
    store.delete("a/one.bin")
    store.delete("a/one.bin")
    assert not store.exists("a/one.bin")
    assert store.exists("a/empty")
    with pytest.raises(FileNotFoundError):
        store.get("a/one.bin")


def test_a_listing_says_when_things_were_written(root: str) -> None:
    store, before = RunStore(root), time.time()
    store.put("a/b.txt", b"123")
    ((path, size, written),) = store.scan_dated("a")
    assert (path, size) == ("a/b.txt", 3)
    assert before - 2 <= written <= time.time() + 2


def test_many_are_fetched_at_once_and_errors_stay_with_their_object(root: str) -> None:
    store = RunStore(root)
    store.put("x/1", b"one")
    store.put("x/2", b"")
    got = store.get_many(["x/1", "x/absent", "x/2"])
    assert (got["x/1"], got["x/2"]) == (b"one", b"")
    assert isinstance(got["x/absent"], FileNotFoundError)
    assert store.get_many([]) == {}


def test_another_process_sees_the_same_store_by_its_uri(root: str) -> None:
    if root.startswith("memory:"):
        pytest.skip("memory is a process's own")
    store = RunStore(root)
    assert len(pickle.dumps(store)) < 500
    store.put("x", b"from the parent")
    program = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).get('x').decode())"
    command = [sys.executable, "-c", program, pickle.dumps(store).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "from the parent\n"


def test_a_store_can_be_used_from_many_threads(root: str) -> None:
    store = RunStore(root)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"n/{i}", b"x" * i), range(24)))
        assert list(pool.map(lambda i: len(store.get(f"n/{i}")), range(24))) == list(range(24))


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up"])
def test_nothing_is_written_outside_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside the run"):
        RunStore(str(tmp_path)).put(path, b"")


def test_a_failed_local_write_leaves_the_old_object_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(str(tmp_path))
    store.put("x", b"old")

    def fail(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        store.put("x", b"new")
    assert store.get("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_relative_root_does_not_depend_on_later_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunStore("out")
    monkeypatch.chdir("/")
    store.put("x", b"1")
    assert (tmp_path / "out" / "x").exists()
    assert store.uri("x") == str(tmp_path / "out" / "x")


def test_paths_of_a_concept_lead_back_to_it() -> None:
    folder = ConceptFolder("cat-1", "f" * 32)
    for path in (folder.embedding, folder.grid, folder.curve, folder.checkpoint, folder.record, folder.failure):
        assert ConceptFolder.of(path) == folder
    assert ConceptFolder.of("images/cat-1/x/y.png") is None
    assert ConceptFolder.of("concepts/cat-1/record.json") is None


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


def test_files_are_matched_by_name_folder_or_glob(root: str) -> None:
    store = RunStore(root)
    for path in ("b.parquet", "a.parquet", "sub/c.parquet", "_meta.parquet", "_temporary/d.parquet", "notes.txt"):
        store.put(path, b"x")
    found = [store.uri(path) for path in ("a.parquet", "b.parquet", "sub/c.parquet")]
    assert match(store.root, ".parquet") == found
    assert match(store.uri("?.parquet"), ".parquet") == found[:2]
    assert match(store.uri("b.parquet"), ".parquet") == found[1:2]
    assert match(store.uri("absent.parquet"), ".parquet") == []
    with open_for_reading(found[0]) as file:
        assert file.read() == b"x"


def test_absolute_keeps_uris_and_roots_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("s3://bucket/x/") == "s3://bucket/x"
    assert absolute("memory://") == "memory://"
    assert absolute("x/y") == str(tmp_path / "x" / "y")
    with pytest.raises(ValueError, match="allowed are"):
        absolute("ftp://host/x")


@pytest.mark.slow
def test_s3_listing_takes_one_request_a_thousand_objects(many_photos: list[str], s3_calls: list[str]) -> None:
    store = RunStore(many_photos[0].rpartition("/photos/")[0])
    assert len(store.list("photos")) == len(many_photos)
    assert s3_calls == ["ListObjectsV2"] * 2


@pytest.mark.slow
def test_s3_puts_and_gets_are_one_request_each(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    store.put("x", b"1")
    store.get("x")
    read_bytes(store.uri("x"))
    store.get_many(["x"])
    assert s3_calls == ["PutObject", "GetObject", "GetObject", "GetObject"]


@pytest.mark.slow
def test_s3_wants_the_right_key(bucket: str, s3_server: S3Server) -> None:
    program = f"from pipeline.store.storage import RunStore; RunStore({bucket!r}).put('x', b'1')"
    environment = {**os.environ, **s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    command = [sys.executable, "-c", program]
    assert "PermissionError" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr
