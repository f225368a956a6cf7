"""An S3 server in memory with the operations that resuming a run needs, which counts requests: for more objects than a
real server takes in within the time of a test. It does not check signatures."""

from __future__ import annotations

import bisect
import contextlib
import datetime
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web

from tests.pipeline.http_thread import serve

_WRITTEN = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
_PAGE = 1000


@dataclass
class S3Memory:
    """State of the server. A bucket exists once an object is put in it."""

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Contents of the objects by `bucket/key`."""
    requests: Counter[str] = field(default_factory=Counter)
    tag_salt: bytes = b""
    """Salt that makes entity tags differ from the content's MD5, as encryption with the owner's keys does."""
    _names: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        name = unquote(request.path).strip("/")
        if request.method == "GET" and request.query.get("list-type") == "2":
            self.requests["list"] += 1
            return self._list(name, request)
        self.requests[request.method.lower()] += 1
        if request.method == "PUT":
            return await self._put(name, request)
        if request.method == "DELETE":
            self.objects.pop(name, None)
            self._names.clear()
            return web.Response(status=204)
        content = self.objects.get(name)
        if content is None:
            return _error(404, "NoSuchKey")
        headers = {
            "ETag": _tag(content, self.tag_salt),
            "Last-Modified": _WRITTEN.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        }
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(content))})
        part = request.http_range
        if part.start is None and part.stop is None:
            return web.Response(body=content, headers=headers)
        found = content[part]
        first = part.start if part.start >= 0 else len(content) + part.start
        span = f"bytes {first}-{first + len(found) - 1}/{len(content)}"
        return web.Response(status=206, body=found, headers={**headers, "Content-Range": span})

    async def _put(self, name: str, request: web.Request) -> web.Response:
        held = self.objects.get(name)
        wanted = request.headers.get("If-Match")
        if (request.headers.get("If-None-Match") == "*" and held is not None) or (
            wanted is not None and (held is None or _tag(held, self.tag_salt) != wanted)
        ):
            return _error(412, "PreconditionFailed")
        body = await request.read()
        if "aws-chunked" in request.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        self.objects[name] = body
        self._names.clear()
        return web.Response(headers={"ETag": _tag(body, self.tag_salt)})

    def _list(self, bucket: str, request: web.Request) -> web.Response:
        if len(self._names) != len(self.objects):
            self._names = sorted(self.objects)
        prefix, slash = f"{bucket}/{request.query.get('prefix', '')}", request.query.get("delimiter")
        after = request.query.get("continuation-token") or request.query.get("start-after") or ""
        position = bisect.bisect_right(self._names, max(f"{bucket}/{after}", prefix)) if after else (
            bisect.bisect_left(self._names, prefix)
        )  # fmt: skip
        entries, folders, last, is_cut = [], dict[str, None](), "", False
        for name in self._names[position:]:
            if not name.startswith(prefix):
                break
            if len(entries) == min(_PAGE, int(request.query.get("max-keys", _PAGE))):
                is_cut = True
                break
            key, rest = name[len(bucket) + 1 :], name[len(prefix) :]
            if slash and slash in rest:
                folders[key[: len(key) - len(rest)] + rest.split(slash)[0] + slash] = None
                continue
            content, last = self.objects[name], key
            entries.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{_WRITTEN.isoformat()}</LastModified>"
                f"<ETag>{_tag(content, self.tag_salt)}</ETag><Size>{len(content)}</Size></Contents>"
            )
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if is_cut else ""
        common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        return web.Response(
            text=f"<?xml version='1.0'?><ListBucketResult><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
            f"<KeyCount>{len(entries)}</KeyCount>{more}{''.join(entries)}{common}</ListBucketResult>",
            content_type="application/xml",
        )


def _tag(content: bytes, salt: bytes = b"") -> str:
    return f'"{hashlib.md5(salt + content, usedforsecurity=False).hexdigest()}"'


def _error(status: int, code: str) -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def _unchunked(body: bytes) -> bytes:
    """Decode `aws-chunked` content: chunks with their sizes in hexadecimal, then trailers."""
    content = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.partition(b";")[0], 16)
        if not size:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content


@contextlib.contextmanager
def serve_memory() -> Iterator[S3Memory]:
    """Run the server on a free port, in a thread of this process."""
    server, app = S3Memory(), web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", server.answer)
    with serve(app) as server.endpoint:
        yield server
