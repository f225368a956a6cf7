"""Against a real server on this machine, which stands for the public as well as for the private ones."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import ipaddress
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.store import http_client
from pipeline.store.http_client import AccessRules, is_public, read

BIG = bytes(range(256)) * 8192


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path; keeps what was asked for."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        what, _, rest = self.path[1:].partition("?")[0].partition("/")
        status = int(what) if what.isdigit() else 200
        if what == "flaky":
            status = 200 if len(self.server.asked) > 2 else 503
        if what == "trickle":
            self.trickle()
            return
        if what == "talkative":
            self.wfile.write(b"HTTP/1.1 2x0 " + b"<script>" * 12_000 + b"\r\n\r\n")
            return
        headers = {"Location": rest.replace("PORT", str(self.server.server_port))} if what == "to" else {}
        body = {"big": BIG, "packed": gzip.compress(bytes(10**6))}.get(what, b"12345")
        if what == "cut":
            headers["Content-Length"] = "1000"
        if what == "packed":
            headers["Content-Encoding"] = "gzip"
        if what == "round":
            headers["Location"] = "/round"
        self.send_response(302 if "Location" in headers else status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def trickle(self) -> None:
        """Send a byte now and then, until the reader has gone."""
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.is_over.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setattr(http_client, "FIRST_WAIT_S", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        server.is_over = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.is_over.set()  # type: ignore[attr-defined]
        server.shutdown()


def url(server: Any, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_port}/{path}"


LOCAL = AccessRules(networks=("127.0.0.0/8",))


def test_a_large_body_comes_whole_in_one_request(server: Any) -> None:
    assert read(url(server, "big"), 2**22) == BIG
    assert server.asked == ["/big"]


@pytest.mark.parametrize(
    ("path", "kind", "message", "requests"),
    [
        ("404", FileNotFoundError, "answered 404", 1),
        ("403", PermissionError, "answered 403, not allowed; a signed address may have expired", 1),
        ("418", ValueError, "answered 418", 1),
        ("500", OSError, r"answered 500 \(3 requests\)", 3),
        ("429", OSError, "answered 429", 3),
        ("cut", OSError, "ClientPayloadError", 3),
        ("big", ValueError, "more than 1,000 bytes", 1),
    ],
)
def test_answers_that_are_no_photo(server: Any, path: str, kind: type, message: str, requests: int) -> None:
    with pytest.raises(kind, match=message):
        read(url(server, path), 1000)
    assert len(server.asked) == requests


def test_what_may_mend_is_asked_for_again(server: Any) -> None:
    assert read(url(server, "flaky"), 10) == b"12345"
    assert len(server.asked) == 3


@pytest.mark.usefixtures("server")
def test_what_nobody_listens_to_is_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="ClientConnectorError"):
            read(f"http://127.0.0.1:{free.getsockname()[1]}/", 10)
    with pytest.raises(ValueError, match="not, or does not lead to, an address"):
        read("http://", 10)


def test_a_compressed_answer_is_not_blown_up(server: Any) -> None:
    assert len(read(url(server, "packed"), 10_000)) < 10_000


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1"])
def test_this_machine_is_not_reached_by_any_of_its_names(server: Any, host: str) -> None:
    with pytest.raises(ValueError, match=r"is no public address; photos\.private_networks can allow|not, or does not"):
        read(url(server, "photo", host), 10, AccessRules())
    assert server.asked == []
    if host in ("127.0.0.1", "localhost"):
        assert read(url(server, "photo", host), 10, AccessRules(networks=("127.0.0.0/8", "::1/128"))) == b"12345"


def test_a_photo_that_trickles_has_a_bound_over_all_requests(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_TIME_S", 3.0)
    with pytest.raises(OSError, match="not read within 3 s, all requests together"):
        read(url(server, "trickle"), 10**6, LOCAL)
    assert server.asked == ["/trickle"]


def test_what_a_server_says_of_itself_is_cut(server: Any) -> None:
    with pytest.raises(OSError, match="requests") as raised:
        read(url(server, "talkative"), 10**6, LOCAL)
    assert len(str(raised.value)) < 1200


def test_a_redirect_is_held_to_the_same_bounds(server: Any) -> None:
    inside = url(server, "to/http://127.0.0.1:PORT/photo")
    assert read(inside, 10, LOCAL) == b"12345"
    away = url(server, "to/http://127.0.0.2:PORT/photo")
    with pytest.raises(ValueError, match=r"127\.0\.0\.2 is no public address"):
        read(away, 10, AccessRules(networks=("127.0.0.1/32",)))
    with pytest.raises(ValueError, match=r"leads to http://, which photos\.schemes does not allow"):
        read(inside, 10, AccessRules(schemes=("https",), networks=LOCAL.networks))
    server.asked.clear()
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://127.0.0.1/x"):
        with pytest.raises(ValueError, match=r"not, or does not lead to, an address of the web"):
            read(url(server, f"to/{place}"), 10, LOCAL)
    assert len(server.asked) == 4  # each asked for once
    with pytest.raises(ValueError, match="redirected more than 5 times"):
        read(url(server, "round"), 10, LOCAL)


def test_a_name_that_answers_differently_later_gains_nothing(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked is the socket's own destination: it is looked up once, by whoever connects."""
    answers: list[str] = []
    look_up = socket.getaddrinfo

    def changing(host: Any, *rest: Any, **options: Any) -> Any:
        if host != "photos.example":
            return look_up(host, *rest, **options)
        answers.append(host)
        return look_up("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is no public address"):
        read(url(server, "photo", "photos.example"), 10, AccessRules())
    assert len(answers) == 1
    assert server.asked == []


def test_errors_hold_no_credentials(server: Any) -> None:
    for path in ("500?sig=SeCrEt", "403?sig=SeCrEt", "cut?sig=SeCrEt"):
        with pytest.raises(OSError, match=r"answered|Payload") as raised:
            read(url(server, path, "me:SeCrEt@127.0.0.1"), 1000)
        assert "SeCrEt" not in repr(raised.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2600::1", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1", False),
        ("fd00::1", False), ("fd00:ec2::254", False), ("ff02::1", False), ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True), ("64:ff9b::a9fe:a9fe", False), ("64:ff9b::808:808", True), ("2002:7f00:1::", False),
        ("::127.0.0.1", False), ("::8.8.8.8", False), ("fec0::1", False), ("::ffff:0:10.0.0.1", False),
        ("64:ff9b:1::a00:1", False), ("5f00::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public
