from __future__ import annotations

import hashlib
import random
from pathlib import Path

import fsspec
import pytest

from pipeline.config import PhotoConfig
from pipeline.inputs import content_hash
from pipeline.inputs.content_hash import content_hashes, folder_hash
from pipeline.store.storage import RunStore


def test_identity_is_of_the_content_wherever_it_lies(root: str) -> None:
    store = RunStore(root)
    contents = {"p/a.png": b"cat", "p/copy.png": b"cat", "p/b.png": b"dog", "q/empty.png": b"", "q/ü z.png": b"x"}
    for path, data in contents.items():
        store.put(path, data)
    expected = {store.uri(path): hashlib.md5(data).hexdigest() for path, data in contents.items()}
    assert content_hashes(expected) == expected
    store.put("p/a.png", b"bat")
    assert content_hashes([store.uri("p/a.png")]) == {store.uri("p/a.png"): hashlib.md5(b"bat").hexdigest()}


def test_a_photo_without_identity_does_not_hide_the_others(root: str) -> None:
    store = RunStore(root)
    store.put("p/a.png", b"cat")
    found = content_hashes([store.uri("p/a.png"), store.uri("p/absent.png"), "ftp://host/x.png"])
    assert found[store.uri("p/a.png")] == hashlib.md5(b"cat").hexdigest()
    assert isinstance(found[store.uri("p/absent.png")], FileNotFoundError)
    assert isinstance(found["ftp://host/x.png"], ValueError)
    assert content_hashes([]) == {}


def test_a_folder_is_known_by_its_files_names_and_content(root: str) -> None:
    store = RunStore(root)
    store.put("model/unet/weights", b"1")
    store.put("model/config.json", b"{}")
    before = folder_hash(store.uri("model"))
    assert folder_hash(store.uri("model") + "/") == before
    store.put("model/unet/weights", b"2")
    changed = folder_hash(store.uri("model"))
    store.put("model/unet/weights", b"1")
    store.put("model/extra", b"")
    assert len({before, changed, folder_hash(store.uri("model"))}) == 3


def test_an_empty_folder_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no files"):
        folder_hash(str(tmp_path))


def test_what_may_not_be_fetched_is_not_looked_up_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hash, "open_filesystem", lambda uri: pytest.fail(f"{uri} was opened"))
    (tmp_path / "a.png").write_bytes(b"cat")
    found = content_hashes([str(tmp_path / "a.png"), "s3://bucket/a.png"], PhotoConfig(schemes=("file",), max_bytes=2))
    assert "may not come from s3://" in str(found["s3://bucket/a.png"])
    assert "more than 2 bytes" in str(found[str(tmp_path / "a.png")])


@pytest.mark.slow
def test_s3_photos_cost_listings_and_no_reads(many_photos: list[str], s3_calls: list[str]) -> None:
    random.Random(0).shuffle(shuffled := list(many_photos))
    found = content_hashes(shuffled)
    assert found == {photo: hashlib.md5(str(i).encode()).hexdigest() for i, photo in enumerate(many_photos)}
    assert set(s3_calls) == {"ListObjectsV2"}
    assert len(s3_calls) <= 3


@pytest.mark.slow
def test_s3_photos_far_apart_cost_one_listing_each_at_most(many_photos: list[str], s3_calls: list[str]) -> None:
    few = [many_photos[3], many_photos[700], many_photos[1039]]
    assert all(isinstance(identity, str) for identity in content_hashes(few).values())
    assert set(s3_calls) == {"ListObjectsV2"}
    assert len(s3_calls) <= len(few)


@pytest.mark.slow
def test_s3_objects_put_in_parts_are_read(bucket: str, s3_calls: list[str]) -> None:
    data = bytes(11 * 2**20)
    fsspec.filesystem("s3").pipe_file(f"{bucket}/big.png", data, chunksize=5 * 2**20)
    assert "CompleteMultipartUpload" in s3_calls
    assert content_hashes([f"{bucket}/big.png"]) == {f"{bucket}/big.png": hashlib.md5(data).hexdigest()}
    assert s3_calls[-2:] == ["ListObjectsV2", "GetObject"]
