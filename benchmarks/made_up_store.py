"""An S3 server, in a process of its own, whose bucket holds the results of any number of concepts that nobody learned.

The objects of a concept are told from its number, so that a million concepts, five million objects, take no time to
put and little memory: only the entity tags and sizes of their records are kept. All other objects are held as they are
put; those of a report's parts are counted and not held.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from aiohttp import web

BUCKET = "made-up"
OUTPUT = f"s3://{BUCKET}/out"
PAGE = 1000
WRITTEN = "2026-01-02T03:04:05.000Z"
_ROOT = "out/concepts/"
_LAST = "\U0010ffff"
_COUNTED = "out/report/"


def concept_id(number: int) -> str:
    return f"concept-{number:07d}"


@dataclass
class MadeUpStore:
    """The objects."""

    folder: Path
    """Local folder with three files: `fingerprints`, 32 characters for each concept; `tags` and `sizes`, 16 bytes and
    an int64 for each record."""

    files: Mapping[str, bytes]
    """Content of each concept's files by name, the record left out."""

    put: dict[str, bytes] = field(default_factory=dict)
    """Objects that were put, by key."""

    requests: dict[str, int] = field(default_factory=dict)

    def open(self) -> None:
        """Read the facts of the concepts."""
        self.fingerprints = (self.folder / "fingerprints").read_bytes()
        self.tags = (self.folder / "tags").read_bytes()
        self.sizes = np.fromfile(self.folder / "sizes", np.int64)
        self.names = sorted([*self.files, "record.json"])
        self.hashes = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}
        self.keys = range(len(self.sizes) * len(self.names))

    def key(self, position: int) -> str:
        number, file = divmod(position, len(self.names))
        fingerprint = self.fingerprints[32 * number : 32 * number + 32].decode()
        return f"{_ROOT}{concept_id(number)}/{fingerprint}/{self.names[file]}"

    def facts(self, position: int) -> tuple[str, int]:
        """Return entity tag and size of an object."""
        number, file = divmod(position, len(self.names))
        name = self.names[file]
        if name in self.files:
            return self.hashes[name], len(self.files[name])
        return self.tags[16 * number : 16 * number + 16].hex(), int(self.sizes[number])

    def list(self, prefix: str, after: str, most: int) -> tuple[list[tuple[str, str, int]], bool]:
        """Return (key, tag, size) of the objects of a prefix behind `after`, and whether there are more."""
        if not prefix.startswith(_ROOT):
            keys = sorted(key for key in self.put if key.startswith(prefix) and key > after)
            found = [(key, hashlib.md5(self.put[key]).hexdigest(), len(self.put[key])) for key in keys[:most]]
            return found, len(keys) > most
        first = bisect.bisect_left(self.keys, prefix, key=self.key)
        if after:
            first = max(first, bisect.bisect_right(self.keys, after, key=self.key))
        end = bisect.bisect_left(self.keys, prefix + _LAST, key=self.key)
        shown = range(first, min(first + most, end))
        return [(self.key(position), *self.facts(position)) for position in shown], first + most < end

    async def answer(self, request: web.Request) -> web.Response:
        key = unquote(request.path).partition(f"/{BUCKET}")[2].strip("/")
        is_listing = request.method == "GET" and request.query.get("list-type") == "2"
        what = "list" if is_listing else request.method.lower()
        self.requests[what] = self.requests.get(what, 0) + 1
        if is_listing:
            return self._answer_listing(request)
        if request.method == "PUT":
            content = await request.read()
            self.put[key] = b"" if key.startswith(_COUNTED) else content
            return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        if request.method == "DELETE":
            self.put.pop(key, None)
            return web.Response(status=204)
        content = self.put.get(key) or self.files.get(key.rpartition("/")[2] if key.startswith(_ROOT) else "")
        if content is None:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        tag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
        if request.method == "HEAD":
            return web.Response(headers={**tag, "Content-Length": str(len(content))})
        return web.Response(body=content, headers=tag)

    def _answer_listing(self, request: web.Request) -> web.Response:
        query = request.query
        after = query.get("continuation-token") or query.get("start-after") or ""
        entries, is_cut = self.list(query.get("prefix", ""), after, min(PAGE, int(query.get("max-keys", PAGE))))
        shown = "".join(
            f"<Contents><Key>{key}</Key><LastModified>{WRITTEN}</LastModified><ETag>&quot;{tag}&quot;</ETag>"
            f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, tag, size in entries
        )
        more = f"<NextContinuationToken>{entries[-1][0]}</NextContinuationToken>" if is_cut else ""
        return web.Response(
            text="<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}{shown}"
            "</ListBucketResult>",
            content_type="application/xml",
        )


def _serve(folder: str, files: Mapping[str, bytes], pipe: Any) -> None:
    store = MadeUpStore(Path(folder), files)

    async def run() -> None:
        app = web.Application(client_max_size=2**30)

        async def opened(_: web.Request) -> web.Response:
            store.open()
            return web.Response()

        app.router.add_get("/open", opened)
        app.router.add_route("*", "/{path:.*}", store.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def serve(folder: Path, files: Mapping[str, bytes]) -> Iterator[dict[str, str]]:
    """Run the server; yield the environment that directs a client to it. GET /open lets it read the concepts' facts."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(str(folder), files, there), daemon=True)
    process.start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
    finally:
        process.terminate()
        process.join()
