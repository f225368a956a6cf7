"""A command whose cluster has lost its head ends with the cause and with code 75."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.exit_codes import STOPPED
from pipeline.head_watch import await_loss

_ROOT = Path(__file__).resolve().parents[2]
_WATCHING = """
import socket, time
from types import SimpleNamespace
import ray
from pipeline import head_watch
head = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{head.getsockname()[1]}"
ray.is_initialized = lambda: True
ray.get_runtime_context = lambda: SimpleNamespace(gcs_address=address)
head_watch.watch_head()
time.sleep(3)
print("there", flush=True)
head.close()
time.sleep(300)
"""
"""Program with a head of its own, which goes away; its main thread takes no part."""


class Head:
    """A head that answers as `answers` says, with a clock that moves when the watch sleeps."""

    def __init__(self, answers: str, *, needed: int = 10_000) -> None:
        self._answers: Iterator[str] = iter(answers)
        self._needed = needed
        self.now = 0.0

    def is_lost(self, bound_s: float) -> bool:
        return await_loss(
            lambda: next(self._answers) == "y", self._is_needed, bound_s, clock=lambda: self.now, sleep=self._sleep
        )

    def _is_needed(self) -> bool:
        self._needed -= 1
        return self._needed >= 0

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_head_that_comes_back_in_time_is_waited_for() -> None:
    head = Head("yy" + "n" * 24 + "y" + "n" * 100)
    assert head.is_lost(50.0)
    assert head.now == 2 * (2 + 24 + 1 + 24)  # it is looked for every two seconds


def test_a_process_that_has_left_its_cluster_goes_on() -> None:
    assert not Head("n" * 100, needed=20).is_lost(50.0)


@pytest.mark.slow
def test_a_process_ends_with_the_cause() -> None:
    environment = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "6"}
    ended = subprocess.run(
        [sys.executable, "-c", _WATCHING], cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ended.returncode == STOPPED, ended.stderr
    assert ended.stdout == "there\n"
    assert "has not answered for 5 s: its GCS was killed" in ended.stderr
    assert ended.stderr.endswith("run the same command again to continue\n")
