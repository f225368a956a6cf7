"""The message at a run's end, against a server of this machine."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from aiohttp import web

from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.exit_codes import TOLERATED
from pipeline.ledger.plan import Plan
from pipeline.report.run_stats import RunStats
from pipeline.report.webhook import message_of, notify
from pipeline.report_config import ReportConfig
from pipeline.store import retries
from tests.pipeline.http_thread import serve


def server(answers: list[int], received: list[Any]) -> web.Application:
    """Answers with these statuses in turn, and keeps what was posted."""

    async def take(request: web.Request) -> web.Response:
        received.append(await request.json())
        return web.Response(status=answers.pop(0))

    app = web.Application()
    app.router.add_post("/services/SeCrEt", take)
    return app


def a_message() -> dict[str, Any]:
    stats = RunStats(rows=5, learned=3, failures={"a": "x"}, exit_code=TOLERATED, meaning="tolerated")
    stats.problems["drawing"] = "s3://me:SeCrEt@bucket is gone"
    return message_of(RunConfig(output="s3://me:SeCrEt@bucket/out"), stats, Plan("settings", set()))


@pytest.mark.parametrize(
    ("answers", "num_posts", "warning"),
    [([200], 1, ""), ([503, 429, 200], 3, ""), ([404], 1, "404"), ([500] * 8, 8, "8 calls failed")],
)
def test_it_is_posted_until_it_arrives(
    answers: list[int], num_posts: int, warning: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    received: list[Any] = []
    with caplog.at_level(logging.INFO), serve(server(answers, received)) as address:
        notify(f"{address}/services/SeCrEt", a_message())
    assert received == [json.loads(json.dumps(a_message() | {"seconds": received[0]["seconds"]}))] * num_posts
    assert received[0]["text"].startswith(
        "s3://***@bucket/out: tolerated; 3 learned, 0 done before, 1 failed, 0 bad rows"
    )
    assert (received[0]["exit_code"], received[0]["counts"]["learned"]) == (TOLERATED, 3)
    assert "SeCrEt" not in caplog.text + json.dumps(received)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warning) == bool(warnings)
    assert warning in "".join(warnings)


def test_the_address_may_be_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Any] = []
    with serve(server([200], received)) as address:
        monkeypatch.setenv("HOOK", f"{address}/services/SeCrEt")
        notify("$HOOK", a_message())
    assert len(received) == 1
    monkeypatch.delenv("HOOK")
    notify("$HOOK", a_message())
    assert "environment variable HOOK is not set" in caplog.text


def test_no_one_sees_the_address() -> None:
    config = RunConfig(report=ReportConfig(webhook="https://u:SeCrEt@hooks.slack.com/services/SeCrEt"))
    assert shown_tree(config)["report"]["webhook"] == "https://hooks.slack.com/***"
    ReportConfig(webhook="https://hooks.slack.com/***")  # as run.json holds it
    for wrong in ("hooks.slack.com/SeCrEt", "ftp://host/SeCrEt", "$SeCrEt-1", "https:///SeCrEt"):
        with pytest.raises(ValueError, match=r"report\.webhook") as error:
            ReportConfig(webhook=wrong)
        assert "SeCrEt" not in str(error.value).replace("$SeCrEt-1", "")
