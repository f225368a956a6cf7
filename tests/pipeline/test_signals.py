"""Signals that stop a command."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.signals import stopping_on_signals


def test_the_first_signal_stops_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
