"""Signals that stop a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """Set the event at the first SIGTERM or Ctrl-C, and interrupt at the second.

    Enter it after ray.init, which sets signal handlers of its own.
    """
    stop = threading.Event()

    def handle(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with handling_signals(handle):
        yield stop


@contextmanager
def handling_signals(handler: Any) -> Iterator[None]:
    """Give SIGTERM and Ctrl-C to `handler` in the block. Enter it in the main thread, after ray.init."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
