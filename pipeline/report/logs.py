"""Log lines of this process, without credentials: text for people, or one JSON object a line for a log store."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Mapping

from pipeline.config import LogFormat
from pipeline.store.errors import printable_lines
from pipeline.store.redact import RedactingFormatter, redact, redact_logs

_OWN_LOGGERS = ("__main__", "pipeline", "textual_inversion")


class JsonFormatter(RedactingFormatter):
    """Formats a log record like `json_line`, with its traceback where it has one."""

    def format(self, record: logging.LogRecord) -> str:
        return json_line(super().format(record), level=record.levelname, logger=record.name)


def configure_logs(log_format: LogFormat = "text", level: int = logging.INFO) -> None:
    """Set the format of this process's log records, and send them to stderr unless they go elsewhere already.

    `level` is for the records of this project. Of other libraries' only warnings and errors are written: a store's
    client, for one, tells at every start where it found credentials.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in _OWN_LOGGERS if level < logging.WARNING else ():
        logging.getLogger(name).setLevel(level)
    if log_format == "text":
        redact_logs()
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter("%(message)s"))


def hide_token_notice() -> None:
    """Keep from the terminal that Ray protects a cluster of this machine by a token, which asks nothing of the user.
    That a cluster is open to others is still said."""
    ray_log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    ray_log.addFilter(lambda record: "is enabled" not in record.getMessage())


def say(log_format: LogFormat, text: str) -> None:
    """Write a line of the command, or several, on stdout, as a terminal can print it; `text` ends with a newline."""
    text = printable_lines(text)
    sys.stdout.write(json_line(text.rstrip("\n")) + "\n" if log_format == "json" else text)


def announce(log_format: LogFormat, text: str) -> None:
    """Write on stderr what the command begins now and may take a while."""
    sys.stderr.write((json_line(text) if log_format == "json" else f"{text} ...") + "\n")
    sys.stderr.flush()


def json_line(
    message: str, *, level: str = "INFO", logger: str = "run", facts: Mapping[str, object] | None = None
) -> str:
    """Return one JSON object: `time` (UTC, ISO 8601, milliseconds), `level`, `logger`, `message`, then the facts."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, "logger": logger, "message": redact(message), **(facts or {})})
