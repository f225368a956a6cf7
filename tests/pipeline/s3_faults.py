"""An HTTP layer between clients and a real S3 server that loses, cuts, delays and refuses requests."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import ClientSession, TCPConnector, web

from tests.pipeline.http_thread import serve

_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "ServiceUnavailable", "Service is unable to handle request."),
    "slow-down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
KINDS = ("500", "503", "slow-down", "hang", "reset", "lost-answer", "cut-answer", "cut-upload")
"""Kinds of fault. `lost-answer`: the server does the operation and its answer is lost. `cut-upload`: the server gets
half an object."""
_SESSION = web.AppKey("session", ClientSession)
_KEPT_BACK = {"content-length", "transfer-encoding", "connection", "content-encoding"}


@dataclass
class S3Faults:
    """Faults inflicted on requests. The fields may be changed while requests come."""

    upstream: str
    endpoint: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Kind of fault -> fraction of requests that it happens to."""
    expired_keys: set[str] = field(default_factory=set)
    """Access keys that are refused."""
    hang_s: float = 3.0
    """Seconds for which a hanging request is held before it is dropped."""
    lag_s: float = 0.0
    """Age in seconds below which objects are in no listing."""
    requests: Counter[str] = field(default_factory=Counter)
    """Number of requests by operation, failed ones included."""
    faults: Counter[str] = field(default_factory=Counter)
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests[_operation(request)] += 1
        kind = self._fault(request)
        if kind:
            self.faults[kind] += 1
        if kind in _ANSWERS:
            status, code, text = _ANSWERS[kind]
            said = _ERROR.format(code, text) if request.method != "HEAD" else None
            return web.Response(status=status, text=said, content_type="application/xml")
        if kind == "hang":
            await asyncio.sleep(self.hang_s)
        if kind == "cut-upload":
            await self._send_half(request, body)
        if kind in ("hang", "reset", "cut-upload"):
            return _drop(request)
        status, headers, data = await self._forward(request, body)
        if kind == "lost-answer":
            return _drop(request)
        if self.lag_s and "list-type=2" in request.query_string:
            data = _without_recent(data, self.lag_s)
        if kind == "cut-answer" and len(data) > 1:
            response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            return _drop(request)
        if request.method == "HEAD":
            return web.Response(status=status, headers=headers)
        return web.Response(status=status, headers=headers, body=data)

    def _fault(self, request: web.Request) -> str:
        signed_by = re.search(r"Credential=([^/]+)/", request.headers.get("Authorization", ""))
        if signed_by and signed_by[1] in self.expired_keys:
            return "expired"
        drawn = self._random.random()
        for kind, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                return kind if kind != "cut-upload" or request.method == "PUT" else "reset"
        return ""

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        session = request.app[_SESSION]
        url = self.upstream + request.raw_path
        async with session.request(
            request.method, url, headers=request.headers, data=body, allow_redirects=False,
            skip_auto_headers=["User-Agent", "Accept", "Accept-Encoding"],
        ) as answer:  # fmt: skip
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _KEPT_BACK}
            if request.method == "HEAD" and "Content-Length" in answer.headers:
                headers["Content-Length"] = answer.headers["Content-Length"]
            return answer.status, headers, await answer.read()

    async def _send_half(self, request: web.Request, body: bytes) -> None:
        host, _, port = self.upstream.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = [f"{request.method} {request.raw_path} HTTP/1.1", *(f"{n}: {v}" for n, v in request.headers.items())]
        writer.write("\r\n".join([*head, "", ""]).encode() + body[: len(body) // 2])
        await writer.drain()
        writer.close()


def _drop(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _operation(request: web.Request) -> str:
    if request.method == "GET":
        return "list" if "list-type=2" in request.query_string else "get"
    return {"PUT": "put", "DELETE": "delete", "HEAD": "head"}.get(request.method, "other")


def _without_recent(listing: bytes, lag_s: float) -> bytes:
    now = datetime.datetime.now(datetime.UTC)

    def keep(entry: re.Match[bytes]) -> bytes:
        found = re.search(rb"<LastModified>([^<]+)</LastModified>", entry[0])
        assert found is not None
        age = now - datetime.datetime.fromisoformat(found[1].decode())
        return entry[0] if age.total_seconds() >= lag_s else b""

    return re.sub(rb"<Contents>.*?</Contents>", keep, listing, flags=re.DOTALL)


@contextlib.contextmanager
def serve_faults(upstream: str, **settings: object) -> Iterator[S3Faults]:
    """Put the layer in front of an S3 server, on a port of its own; without settings it only counts."""
    faults = S3Faults(upstream, **settings)  # type: ignore[arg-type]
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", faults.answer)
    app.cleanup_ctx.append(_session)
    with serve(app) as faults.endpoint:
        yield faults


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=100), auto_decompress=False) as app[_SESSION]:
        yield
