"""Calls to a store that fails for a moment, made again: a bounded number of times, ever further apart, and counted.

The only layer that repeats a store's calls: those of the clients are turned off (`s3.options`), so that they do not
multiply. What stays as it is (no such object, no right, no such bucket) is not tried again.
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
from pipeline.store.redact import redact

log = logging.getLogger(__name__)

TRIES = 8
"""Calls at most, the first included: some 25 s of waiting in all."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
"""Doubled from try to try, and cut by up to a half at random, so that many clients do not come back together."""

_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PASSING_KINDS = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "CredentialRetrievalError",
    "ClientPayloadError", "ClientConnectionError",
}  # fmt: skip
"""Errors of S3's and HTTP's clients that are no OSErrors, by name: the clients may not be installed."""
_PASSING_CODES = {
    "IncompleteBody", "RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown", "TooManyRequests",
    "Throttling", "ThrottlingException", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
"""Of answers with a status of 4xx that another call may not get."""
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken"}

T = TypeVar("T")


class Count:
    """A number that threads add to."""

    def __init__(self) -> None:
        self._lock, self._value, self._taken = threading.Lock(), 0, 0

    def add(self, number: int = 1) -> None:
        with self._lock:
            self._value += number

    @property
    def value(self) -> int:
        return self._value

    def take(self) -> int:
        """What was added since this was last asked."""
        with self._lock:
            new, self._taken = self._value - self._taken, self._value
        return new


repeated = Count()
"""Calls that this process made again."""


def with_retries(call: Callable[[], T], renew: Callable[[], Any] | None = None) -> T:
    """What `call` returns, made again as long as its error may pass. `renew` is called when credentials have expired.

    Raises StoreFailed from the last error when all tries have failed; an error that will not pass is raised as it is.
    """
    for number in range(TRIES):
        try:
            return call()
        except Exception as error:
            if not is_retryable(error):
                raise
            if number == TRIES - 1:
                text = redact(f"{TRIES} tries failed, the last with {type(error).__name__}: {error}")
                raise StoreFailed(text) from error
            pause_s = backoff_s(number + 1, FIRST_WAIT_S, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            log.info("a call to storage failed and is made again in %.1f s: %s", pause_s, redact(str(error)))
            repeated.add()
            if renew is not None and _may_have_expired(error):
                renew()
            time.sleep(pause_s)
    raise AssertionError("not reached")


def backoff_s(failures: int, first_s: float, longest_s: float = math.inf) -> float:
    """Return the seconds to wait after `failures` failures in a row: `first_s` after the first, then twice as long each
    time, up to `longest_s`."""
    return min(longest_s, first_s * 2.0 ** (failures - 1))


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may go well a little later."""
    if isinstance(error, (StoreFailed, *_LASTING)):
        return False
    code, status = error_code(error), error_status(error)
    if code in _PASSING_CODES or _may_have_expired(error):
        return True
    if status:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError):
        return not isinstance(error, PermissionError)
    return bool(_PASSING_KINDS & {kind.__name__ for kind in type(error).__mro__})


def _may_have_expired(error: BaseException) -> bool:
    """S3 says so, or nothing but 400: answers to HEAD have no body."""
    code = error_code(error)
    return code in _EXPIRED or (code == "400" and error_status(error) == 400)


def error_code(error: BaseException) -> str:
    """Of S3's answer, such as `SlowDown`; empty for anything else."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def error_status(error: BaseException) -> int:
    """Of the HTTP answer behind an S3 client's error; 0 for anything else."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer(error: BaseException) -> dict[str, Any]:
    """s3fs raises OSErrors from the client's own, which holds the answer."""
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            return answer
    return {}
