"""Hide the passwords and signatures in addresses, for texts that people read.

A job may use the credentials in an address it is given; readers of a log, a record or a report may not. The host, the
path and harmless parameters stay, so that a person can find the object.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_ADDRESS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>`]+)")
_SECRET_NAME = re.compile(
    r"sig|token|secret|password|passwd|pwd|credential|auth|policy|key|code|session|jwt|sas", re.IGNORECASE
)
_PARAMETER = re.compile(r"([?&;#])([^=&;#]+)=([^&;#]*)")
_LONGEST_PLAIN_VALUE = 24
"""Characters of the longest parameter value that is shown. Signatures, tokens and keys are longer; sizes, versions and
catalog numbers are not."""


def redact(text: str) -> str:
    """Return the text with `user:password@` and the secret values of query strings hidden in every address.

    A value is secret if its parameter's name says so (`X-Amz-Signature`, `sig`, `token`, ...) or if it is long. A text
    without such an address is returned unchanged.
    """
    return _ADDRESS.sub(_redact_address, text) if "://" in text else text


def redacted(value: Any) -> Any:
    """Return a nested value of lists, tuples and mappings with `redact` applied to every text."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


class RedactingFormatter(logging.Formatter):
    """Formatter of log lines, tracebacks included, that redacts addresses, also in what libraries log."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_logs() -> None:
    """Redact the lines that this process's root logger writes from this call on."""
    for handler in logging.getLogger().handlers:
        current = handler.formatter
        handler.setFormatter(RedactingFormatter(current._fmt if current else None))


def _redact_address(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    authority = re.match(r"[^/?#]*", rest)
    assert authority is not None
    user, at, host = authority[0].rpartition("@")
    is_container = scheme.lower() in ("abfs", "abfss", "az") and ":" not in user  # container@account, no secret
    if at and not is_container:
        user = HIDDEN
    return f"{scheme}://{user}{at}{host}{_PARAMETER.sub(_redact_parameter, rest[authority.end() :])}"


def _redact_parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    is_secret = _SECRET_NAME.search(name) or len(value) > _LONGEST_PLAIN_VALUE
    return f"{mark}{name}={HIDDEN if value and is_secret else value}"
