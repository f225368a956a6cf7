"""Copies of objects on the local disk: whole, fetched once, and anew when the object has changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.store.local_copies import local_copy

URI = "memory://models/mine.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "textual-inversion"


def put(data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file("/models/mine.safetensors", data)


def test_an_object_is_fetched_once_and_anew_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    fetched: list[str] = []
    get_file = memory.get_file

    def counted(self: Any, path: str, target: str, **options: Any) -> None:
        fetched.append(path)
        get_file(self, path, target, **options)

    monkeypatch.setattr(memory, "get_file", counted)
    put(b"first")
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(local_copy, [URI] * 8))
    (copy,) = copies
    assert (copy.name, copy.read_bytes(), len(fetched)) == ("mine.safetensors", b"first", 1)
    put(b"the second")
    assert local_copy(URI).read_bytes() == b"the second"
    assert copy.read_bytes() == b"first"


def test_a_fetch_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Any, _path: str, target: str, **_options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("the connection was lost")

    put(b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "get_file", broken)
        with pytest.raises(OSError, match="the connection was lost"):
            local_copy(URI)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert local_copy(URI).read_bytes() == b"whole"


def test_what_is_not_there_and_what_is_not_allowed() -> None:
    with pytest.raises(FileNotFoundError):
        local_copy("memory://models/absent.safetensors")
    with pytest.raises(ValueError, match="begins with ftp://"):
        local_copy("ftp://models/mine.safetensors")
