"""Stores to run the same tests on: local disk, memory, and a real S3 server started for the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from aiobotocore.client import AioBaseClient

from tests.pipeline.s3_memory import S3Memory, serve_memory
from tests.pipeline.s3_server import S3Server


@pytest.fixture(scope="session")
def many_photos(s3_server: S3Server) -> list[str]:
    """Put 1,040 small objects on S3, four for each concept in the concept's folder: more than one page of a listing."""
    bucket = s3_server.make_bucket("many")
    photos = [f"{bucket}/photos/c{i // 4:03d}/{i % 4}.png" for i in range(1040)]
    fs = fsspec.filesystem("s3", **s3_server.options)
    fs.pipe({photo: str(i).encode() for i, photo in enumerate(photos)})
    return photos


@pytest.fixture
def s3_calls(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of every later S3 operation is appended; the real client still sends it."""
    assert s3_server.endpoint
    calls: list[str] = []
    send = AioBaseClient._make_api_call

    async def counting(self: AioBaseClient, operation: str, parameters: object) -> object:
        calls.append(operation)
        return await send(self, operation, parameters)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counting)
    return calls


@pytest.fixture
def s3_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Memory]:
    """Run an S3 server in memory that counts requests, and direct this process to it."""
    with serve_memory() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        fsspec.filesystem("s3").clear_instance_cache()
        yield server
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def roots(s3_server: S3Server) -> str:
    """Make a bucket for the folders of `root`: a bucket for each test costs seconds on a busy machine."""
    return s3_server.make_bucket("roots")


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the path or URI of an empty folder on each kind of store."""
    if request.param == "file":
        return str(tmp_path / "root")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://root"
    return f"{request.getfixturevalue('roots')}/{tmp_path.name}/root"
