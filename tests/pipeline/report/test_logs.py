"""Log lines for people and for log stores."""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys

import pytest
from ray._private.authentication.authentication_token_setup import _warn_token_auth_disabled, _warn_token_auth_enabled

from pipeline.report.logs import JsonFormatter, configure_logs, hide_token_notice, json_line, say


def test_a_record_is_one_object_whatever_is_in_it() -> None:
    try:
        raise OSError("cannot read https://u:p@h/x\nsecond line")
    except OSError as error:
        failed = (type(error), error, error.__traceback__)
    record = logging.LogRecord("pipeline.run", logging.WARNING, "", 1, "photo %s", ("https://u:p@h/x",), failed)
    line = JsonFormatter("%(message)s").format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("WARNING", "pipeline.run")
    assert told["message"].startswith("photo https://***@h/x\nTraceback")
    assert "u:p" not in line
    assert datetime.datetime.fromisoformat(told["time"]).utcoffset() == datetime.timedelta(0)


def test_the_format_is_set_for_every_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [logging.NullHandler(), logging.NullHandler()]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    record = logging.LogRecord("n", logging.INFO, "", 1, "hello", (), None)
    configure_logs("json")
    assert [json.loads(handler.format(record))["message"] for handler in handlers] == ["hello"] * 2
    configure_logs("text")
    assert [handler.format(record) for handler in handlers] == ["hello"] * 2


def test_lines_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    say("text", "3 learned\n")
    say("json", "3 learned\n")
    plain, as_json = capsys.readouterr().out.splitlines()
    assert plain == "3 learned"
    assert json.loads(as_json)["message"] == "3 learned"
    assert json.loads(json_line("m", facts={"done": 3}))["done"] == 3


def test_other_libraries_tell_nothing_but_warnings() -> None:
    """In a process of its own, whose log nobody has set up."""
    program = """
import logging
from pipeline.report.logs import configure_logs
configure_logs()
for name in ("botocore.credentials", "pipeline.store.retries", "textual_inversion.compile_trial"):
    logging.getLogger(name).info("told")
logging.getLogger("botocore.credentials").warning("expired")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "INFO pipeline.store.retries: told",
        "INFO textual_inversion.compile_trial: told",
        "WARNING botocore.credentials: expired",
    ]


def test_ray_does_not_tell_of_the_token_that_it_made(caplog: pytest.LogCaptureFixture) -> None:
    hide_token_notice()
    for told in (_warn_token_auth_enabled, _warn_token_auth_disabled):
        told()
    assert [record.getMessage()[:32] for record in caplog.records] == ["Token authentication is disabled"]
