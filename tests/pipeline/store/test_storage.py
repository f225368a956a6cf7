from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.store.addresses import read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
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
    ((path, size, written, version),) = store.scan_objects("a")
    assert (path, size) == ("a/b.txt", 3)
    assert before - 2 <= written <= time.time() + 2
    assert version


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
        assert ConceptFolder.from_path(path) == folder
    assert ConceptFolder.from_path("images/cat-1/x/y.png") is None
    assert ConceptFolder.from_path("concepts/cat-1/record.json") is None


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
