"""Read one whole object over HTTP, from no network or scheme that the caller did not allow.

The IP address that is checked is the one connected to, for the first request and for every redirect. Host names are
looked up once, so a name that resolves differently the second time (DNS rebinding) gains nothing. Proxies of the
environment are not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fsspec.asyn import get_loop, sync

from pipeline.store.redact import foreign_text
from pipeline.store.retries import backoff_s

if TYPE_CHECKING:
    import aiohttp  # imported in `_read`: most runs read nothing over HTTP, and a dry run must answer at once

MAX_REQUESTS = 3
"""Largest number of requests for one object while the server or the network fails; a 4xx answer is final."""

FIRST_WAIT_S = 0.5
"""Pause before the second request; it doubles before the third."""

MAX_TIME_S = 120.0
"""Longest time for one object, all requests and pauses together: a server may send a byte a second."""

_TIMEOUT_S = {"sock_connect": 20, "sock_read": 60}
_CHUNK_BYTES = 2**16
_MAX_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Prefix of NAT64 (RFC 6052), whose IPv6 addresses end in an IPv4 address."""
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""The only IPv6 addresses that are given to hosts of the internet (RFC 4291, section 2.4). `ipaddress` lists exceptions
instead, and lacks some: IPv4-compatible and IPv4-translated addresses, site-local ones and local-use NAT64."""


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessRules:
    """Addresses that a request may connect to."""

    schemes: tuple[str, ...] = ("http", "https")
    """Schemes allowed in the address and in every redirect."""
    networks: tuple[str, ...] = ()
    """Private networks (CIDR) that may be connected to besides public addresses."""


def read(url: str, limit: int, rules: AccessRules | None = None) -> bytes:
    """Return the body of a GET; with `rules` None any address may be connected to. Compressed transfer is neither
    requested nor decoded.

    Raises FileNotFoundError or PermissionError when the server says so, ValueError for what another request would not
    mend (larger than `limit` bytes, a forbidden or malformed address), and OSError after `MAX_REQUESTS` failures of
    server or network or after `MAX_TIME_S`. The texts name no address but those connected to, and hold no credentials.
    """
    data: bytes = sync(get_loop(), _read_in_time, url, limit, rules)
    return data


def is_public(address: Address) -> bool:
    """Return True unless the address is private, loopback, link-local, shared, reserved or multicast, or an IPv6 form
    of such an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


async def _read_in_time(url: str, limit: int, rules: AccessRules | None) -> bytes:
    try:
        async with asyncio.timeout(MAX_TIME_S) as deadline:
            return await _read_with_retries(url, limit, rules)
    except TimeoutError:
        if deadline.expired():
            raise OSError(f"not read within {MAX_TIME_S:.0f} s, all requests together") from None
        raise


async def _read_with_retries(url: str, limit: int, rules: AccessRules | None) -> bytes:
    for number in range(1, MAX_REQUESTS + 1):
        try:
            return await _read(url, limit, rules)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if number == MAX_REQUESTS:
                raise OSError(f"{error} ({MAX_REQUESTS} requests)") from None
            await asyncio.sleep(backoff_s(number, FIRST_WAIT_S))
    raise AssertionError("the last request returns or raises")


async def _read(url: str, limit: int, rules: AccessRules | None) -> bytes:
    import aiohttp

    refused: list[str] = []
    """Reasons why a connection or redirect was refused, kept here because aiohttp wraps what its callbacks raise."""

    def connect(info: Any) -> socket.socket:
        family, kind, protocol, _, (host, *_) = info
        if rules is not None and not _is_allowed(ipaddress.ip_address(str(host).partition("%")[0]), rules.networks):
            refused.append(f"{host} is no public address; photos.private_networks can allow its network")
            raise PermissionError(refused[-1])
        return socket.socket(family, kind, protocol)

    async def check_scheme(request: Any, handler: Any) -> Any:
        if rules is not None and request.url.scheme not in rules.schemes:
            refused.append(f"it leads to {request.url.scheme}://, which photos.schemes does not allow")
            raise PermissionError(refused[-1])
        return await handler(request)

    connector = aiohttp.TCPConnector(socket_factory=connect, force_close=True)
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(**_TIMEOUT_S),
                middlewares=(check_scheme,),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
            ) as session,
            session.get(url, max_redirects=_MAX_REDIRECTS) as response,
        ):
            _check_status(response.status)
            return await _read_body(response, limit)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        if isinstance(error, aiohttp.InvalidURL):  # a redirect's address, too
            raise ValueError("it is not, or does not lead to, an address of the web") from None
        if refused:
            raise ValueError(refused[-1]) from None
        raise
    except (aiohttp.ClientError, OSError) as error:  # timeouts are OSErrors
        if refused:
            raise ValueError(refused[-1]) from None
        if isinstance(error, aiohttp.NonHttpUrlClientError):  # a redirect to file: or ftp:
            raise ValueError("it is not, or does not lead to, an address of the web") from None
        if isinstance(error, aiohttp.TooManyRedirects):
            raise ValueError(f"redirected more than {_MAX_REDIRECTS} times") from None
        raise OSError(f"{type(error).__name__}: {foreign_text(str(error))}") from None


def _is_allowed(address: Address, networks: Sequence[str]) -> bool:
    return is_public(address) or any(address in ipaddress.ip_network(network) for network in networks)


def _check_status(status: int) -> None:
    answer = f"the server answered {status}"
    if status in (404, 410):
        raise FileNotFoundError(f"{answer}, not found")
    if status in (401, 403, 407):
        raise PermissionError(f"{answer}, not allowed; a signed address may have expired")
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise ValueError(answer)
    if status != 200:
        raise OSError(answer)


async def _read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    too_large = ValueError(f"it has more than {limit:,} bytes")
    if (response.content_length or 0) > limit:
        raise too_large
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)
