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

MAX_FOREIGN_CHARACTERS = 1000
"""Longest text of another program or server that is shown."""

_ADDRESS_START = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]*):[/\\]{2,}|\b(https?|(?<!:)s3a?|gs|gcs|az|abfss?|ftps?):[/\\]?(?=[^\s/\\])",
    re.IGNORECASE,
)
"""Scheme of an address with the slashes after it; of a few schemes also where slashes were lost."""
_ADDRESS = re.compile(r"(?:[^\s'\"<>`]|['\"](?=[\w%+/=~-]))*")
"""Rest of an address; a quote belongs to it where more of a value follows."""
_AUTHORITY = re.compile(r"[^\s/?#]*")
_BARE_CREDENTIALS = re.compile(r"(?<![\w/.@:-])[^\s:/@'\"<>]+:[^\s@/'\"<>]+@(?=[\w.-])")
"""User and password before a host, as clients print them without the scheme."""
_CONTAINER_SCHEMES = ("abfs", "abfss", "az")
_SECRET_NAME = re.compile(
    r"sig|token|secret|password|passwd|pwd|credential|auth|policy|key|code|session|jwt|sas", re.IGNORECASE
)
_PARAMETER = re.compile(r"([?&;#])([^=&;#]+)=([^&;#]*)")
_LONGEST_PLAIN_VALUE = 24
"""Characters of the longest parameter value that is shown. Signatures, tokens and keys are longer; sizes, versions and
catalog numbers are not."""


def redact(text: str) -> str:
    """Return the text with `user:password@` and the secret values of query strings hidden in every address.

    A value is secret if its parameter's name says so (`X-Amz-Signature`, `sig`, `token`, ...) or if it is long. Where
    a password holds what an address may not (a slash, a space, a quote), all up to the last `@` of the line is hidden.
    A text without such an address is returned unchanged.
    """
    starts = list(_ADDRESS_START.finditer(text)) if ":" in text else []
    if not starts:
        return text
    ends = [start.start() for start in starts[1:]] + [len(text)]
    parts = [text[: starts[0].start()]]
    for start, end in zip(starts, ends, strict=True):
        rest = text[start.end() : end]
        parts.append(start[0] + _redact_rest((start[1] or start[2]).lower(), rest))
    return "".join(parts)


def foreign_text(text: str) -> str:
    """Return what another program or server says as one line of at most `MAX_FOREIGN_CHARACTERS`, without credentials
    and control characters. Every such text passes through here before it is logged, stored or shown."""
    line = _BARE_CREDENTIALS.sub(f"{HIDDEN}@", redact(" ".join(text.split())))
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line)
    return line if len(line) <= MAX_FOREIGN_CHARACTERS else f"{line[:MAX_FOREIGN_CHARACTERS]} ..."


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


def _redact_rest(scheme: str, rest: str) -> str:
    """Return what follows a scheme and its slashes without credentials."""
    end = _end_of_credentials(scheme, rest)
    found = _ADDRESS.match(rest, end)
    assert found is not None
    host = _AUTHORITY.match(found[0])
    assert host is not None
    shown = host[0] + _PARAMETER.sub(_redact_parameter, found[0][host.end() :])
    return f"{HIDDEN}@{shown}{rest[found.end() :]}" if end else f"{shown}{rest[found.end() :]}"


def _end_of_credentials(scheme: str, rest: str) -> int:
    """Return the place after the `@` that ends user and password, 0 if there are none."""
    authority = _AUTHORITY.match(rest)
    address = _ADDRESS.match(rest)
    assert authority is not None
    assert address is not None
    line_end = rest.find("\n") if "\n" in rest else len(rest)
    user, at, _ = authority[0].rpartition("@")
    if at:
        if ":" not in user:
            is_account = scheme in _CONTAINER_SCHEMES or re.search(r"['\"<>`]", user)  # container@account, no secret
            return 0 if is_account else len(user) + 1
        return max(len(user), address[0].rfind("@")) + 1  # a password may hold an @ and then a slash
    host = authority[0].rstrip("'\"<>`,;.)]}:!")
    name, colon, port = host.rpartition("]")[2].partition(":")
    if not colon or name in ("arn", "localhost"):
        return 0
    if port.isdigit():  # a host with a port, unless a name without a dot is a user whose password begins with digits
        return 0 if "." in name or "]" in host else address[0].rfind("@") + 1
    return rest.rfind("@", 0, line_end) + 1


def _redact_parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    is_secret = _SECRET_NAME.search(name) or len(value) > _LONGEST_PLAIN_VALUE
    return f"{mark}{name}={HIDDEN if value and is_secret else value}"
