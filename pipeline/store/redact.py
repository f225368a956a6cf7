"""Addresses as they may be shown: without the passwords and signatures that some hold.

Whoever is given an address may use it; whoever reads a log, a record or a report may not. What a person needs to find
the object again (host, path, harmless parameters) stays.
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
"""Signatures, tokens and keys are longer; sizes, versions and catalog numbers are not."""


def redact(text: str) -> str:
    """The text with `user:password@` and the secret values of query strings hidden in every address it holds.

    A value is secret if its parameter's name says so (`X-Amz-Signature`, `sig`, `token`, ...) or if it is long. A text
    without such an address is given back as it is.
    """
    return _ADDRESS.sub(_shown, text) if "://" in text else text


def redacted(value: Any) -> Any:
    """The same for every text in nested lists, tuples and mappings of plain values."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


class RedactingFormatter(logging.Formatter):
    """A log's lines, tracebacks included, with addresses redacted: whatever a library says about them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_logs() -> None:
    """From now on, in what this process's root logger writes."""
    for handler in logging.getLogger().handlers:
        before = handler.formatter
        handler.setFormatter(RedactingFormatter(before._fmt if before else None))


def _shown(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    place = re.match(r"[^/?#]*", rest)
    assert place is not None
    user, at, host = place[0].rpartition("@")
    is_container = scheme.lower() in ("abfs", "abfss", "az") and ":" not in user  # container@account, no secret
    if at and not is_container:
        user = HIDDEN
    return f"{scheme}://{user}{at}{host}{_PARAMETER.sub(_without_secret, rest[place.end() :])}"


def _without_secret(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    is_secret = _SECRET_NAME.search(name) or len(value) > _LONGEST_PLAIN_VALUE
    return f"{mark}{name}={HIDDEN if value and is_secret else value}"
