"""The message at a run's end, posted to the address that `report.webhook` names."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from typing import Any

from pipeline.config import RunConfig
from pipeline.ledger.plan import Plan
from pipeline.report.run_stats import RunStats
from pipeline.report_config import hidden_webhook
from pipeline.store.redact import redact, redacted
from pipeline.store.retries import with_retries
from pipeline.times import format_clock

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_REPEATED = (408, 429)
"""Statuses of 4xx that another call may not get."""


class Refused(Exception):
    """An answer that would be the same again."""


def message_of(config: RunConfig, stats: RunStats, plan: Plan) -> dict[str, Any]:
    """Return what is posted, as JSON values. `text` says it in one line, as Slack's incoming webhooks take it."""
    counts = {
        "learned": stats.learned,
        "done_before": plan.num_done,
        "failed": len(stats.failures),
        "bad_rows": len(plan.bad),
        "left_out": plan.num_left_out,
        "below_gate": stats.gate_retries.below + stats.gate_retries.better,
    }
    output = redact(config.output)
    seconds = time.monotonic() - stats.began
    words = f"{stats.learned:,} learned, {plan.num_done:,} done before, {counts['failed']:,} failed, "
    words += f"{counts['bad_rows']:,} bad rows in {format_clock(seconds)}"
    problems = redacted(dict(stats.problems))
    return {
        "text": "; ".join(
            [f"{output}: {stats.meaning}", words, *(f"{name}: {text}" for name, text in problems.items())]
        ),
        "output": output,
        "manifest": redact(config.manifest),
        "exit_code": stats.exit_code,
        "meaning": stats.meaning,
        "counts": counts,
        "problems": problems,
        "seconds": round(seconds, 1),
        "device_hours": {"of": "gpu" if stats.on_gpus else "core", "hours": round(stats.device_hours, 4)},
        "cost": stats.cost(config.report),
    }


def notify(webhook: str, message: dict[str, Any]) -> None:
    """Post the message, tried again like a call to storage; a message that cannot be delivered is a warning.

    A webhook `$NAME` stands for the address in the environment variable NAME.
    """
    if not webhook:
        return
    try:
        address = os.environ[webhook[1:]] if webhook.startswith("$") else webhook
        with_retries(lambda: _post(address, message), what="posting to report.webhook")
    except KeyError:
        log.warning("report.webhook: the environment variable %s is not set; nothing was posted", webhook[1:])
    except (Refused, OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).replace(webhook, hidden_webhook(webhook))
        log.warning("nothing was posted to report.webhook %s: %s", hidden_webhook(webhook), redact(reason))


def _post(address: str, message: dict[str, Any]) -> None:
    """Post JSON. Raises Refused for an answer that lasts, and OSError for one that may pass."""
    request = urllib.request.Request(address, json.dumps(message).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        text = f"the server answered {error.code} {error.reason}"
        if error.code < 500 and error.code not in _REPEATED:
            raise Refused(text) from None
        raise OSError(text) from None
