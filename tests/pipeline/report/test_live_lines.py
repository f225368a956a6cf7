"""Lines of a terminal that others write above."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from pipeline.report.live_lines import LiveLines, is_terminal
from tests.pipeline.report.test_progress import Terminal


def test_log_lines_go_above_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        live = LiveLines(terminal)
        live.draw(["one", "two"])
        logging.getLogger("pipeline.driver").warning("stopping")
        live.draw(["one", "three"])
        sys.stderr.write("of another library\n")
        live.close()
        live.close()
        assert sys.stderr is terminal
        assert handler.stream is terminal
    finally:
        logging.getLogger().removeHandler(handler)
    erased = "\x1b[1A\r\x1b[J"
    assert terminal.getvalue() == f"one\ntwo{erased}stopping\none\nthree{erased}of another library\n"


def test_lines_are_cut_to_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    terminal = Terminal()
    LiveLines(terminal).draw(["0123456789abc"])
    assert terminal.getvalue() == "012345678"


def test_a_dumb_terminal_gets_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal())
    assert not is_terminal(io.StringIO())
