"""Repeat calls to a store that fails for a moment: a bounded number of times, with growing pauses, and counted.

No other layer repeats a store's calls: the clients' own retries are turned off (`s3.options_without_retries`), so that
the numbers do not multiply. Errors that last (no such object, no right, no such bucket) are not tried again.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.store.errors import StoreFailed
from pipeline.store.redact import foreign_text

log = logging.getLogger(__name__)

MAX_CALLS = 8
"""Largest number of calls, the first included; their pauses add up to at most 26 s."""

FIRST_WAIT_S = 0.2
"""Pause after the first failed call; it doubles from call to call, and is cut by up to a half at random so that many
clients do not come back together."""

LONGEST_WAIT_S = 15.0
"""Upper bound of a pause."""

_LASTING_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PASSING_ERROR_NAMES = {
    "HTTPClientError",
    "ConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "CredentialRetrievalError",
    "ClientPayloadError",
    "ClientConnectionError",
}
"""Errors of S3's and HTTP's clients that are no OSErrors, by name because the clients may not be installed."""

_PASSING_CODES = {
    "IncompleteBody",
    "RequestTimeout",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "SlowDown",
    "TooManyRequests",
    "Throttling",
    "ThrottlingException",
    "OperationAborted",
    "ConditionalRequestConflict",
}
"""S3 error codes with a status of 4xx that another call may not get."""

_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken"}
"""S3 error codes of expired credentials."""

T = TypeVar("T")


class Counter:
    """Number that several threads increment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0
        self._value_at_last_take = 0

    def increment(self) -> None:
        with self._lock:
            self._value += 1

    @property
    def value(self) -> int:
        return self._value

    def take_new(self) -> int:
        """Return the increments since the last call."""
        with self._lock:
            new = self._value - self._value_at_last_take
            self._value_at_last_take = self._value
        return new


retry_count = Counter()
"""Calls to a store that this process has repeated."""


def with_retries(
    call: Callable[[], T], renew_credentials: Callable[[], Any] | None = None, *, what: str = "a call to storage"
) -> T:
    """Call and return the result, calling again while the error may pass; `renew_credentials` is called when
    credentials may have expired. `what` names the call in log lines.

    Raises StoreFailed from the last error when all calls have failed; an error that lasts is raised as it is.
    """
    for attempt in range(MAX_CALLS):
        try:
            return call()
        except Exception as error:
            if not is_retryable(error):
                raise
            if attempt == MAX_CALLS - 1:
                text = foreign_text(f"{MAX_CALLS} calls failed, the last with {type(error).__name__}: {error}")
                raise StoreFailed(text) from error
            pause_s = backoff_s(attempt + 1, FIRST_WAIT_S, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            log.info("%s failed and is repeated in %.1f s: %s", what, pause_s, foreign_text(str(error)))
            retry_count.increment()
            if renew_credentials is not None and _credentials_may_have_expired(error):
                renew_credentials()
            time.sleep(pause_s)
    raise AssertionError("not reached")


def backoff_s(failures: int, first_s: float, longest_s: float = math.inf) -> float:
    """Return the seconds to wait after `failures` failures in a row: `first_s` after the first, then twice as long each
    time, up to `longest_s`."""
    return min(longest_s, first_s * 2.0 ** (failures - 1))


def is_retryable(error: BaseException) -> bool:
    """Return True if the same call may succeed a little later."""
    if isinstance(error, (StoreFailed, *_LASTING_ERRORS)):
        return False
    code = error_code(error)
    status = error_status(error)
    if code in _PASSING_CODES or _credentials_may_have_expired(error):
        return True
    if status:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError):
        return not isinstance(error, PermissionError)
    return bool(_PASSING_ERROR_NAMES & {kind.__name__ for kind in type(error).__mro__})


def error_code(error: BaseException) -> str:
    """Return the code in S3's answer, such as `SlowDown`; "" for any other error."""
    return str(_s3_answer(error).get("Error", {}).get("Code", ""))


def error_status(error: BaseException) -> int:
    """Return the status of the HTTP answer behind an S3 client's error; 0 for any other error."""
    return int(_s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _credentials_may_have_expired(error: BaseException) -> bool:
    """Return True for S3's codes of expired credentials, and for a bare 400: answers to HEAD have no body with a
    code."""
    code = error_code(error)
    return code in _EXPIRED_CODES or (code == "400" and error_status(error) == 400)


def _s3_answer(error: BaseException) -> dict[str, Any]:
    """Return the answer that a client's error holds; s3fs raises OSErrors from such errors."""
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            return answer
    return {}
