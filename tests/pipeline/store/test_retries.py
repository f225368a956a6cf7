from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipeline.store import retries
from pipeline.store.errors import StoreFailed


class ClientError(Exception):
    """As botocore raises it."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def from_s3fs(kind: type[OSError], status: int, code: str = "") -> OSError:
    error = kind(code)
    error.__cause__ = ClientError(status, code)
    return error


class ReadTimeoutError(type("HTTPClientError", (Exception,), {})):  # type: ignore[misc]
    """Named as botocore's and descended as they are."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", made.append)
    return made


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times
    return lambda: _raise(left.pop()) if left else "done"


def _raise(error: Exception) -> str:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        from_s3fs(OSError, 503, "SlowDown"), from_s3fs(OSError, 500, "InternalError"), from_s3fs(OSError, 429),
        from_s3fs(OSError, 400, "IncompleteBody"), from_s3fs(PermissionError, 400, "ExpiredToken"),
        from_s3fs(TimeoutError, 408), ConnectionResetError("peer"), ReadTimeoutError(), TimeoutError(),
        ClientError(503, "SlowDown"), from_s3fs(OSError, 400, "400"),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_and_counted(error: Exception, pauses: list[float]) -> None:
    before = retries.retry_count.value
    assert retries.with_retries(failing(3, error)) == "done"
    assert retries.retry_count.value - before == len(pauses) == 3
    assert all(
        retries.FIRST_WAIT_S * 2**i / 2 <= pause <= retries.FIRST_WAIT_S * 2**i for i, pause in enumerate(pauses)
    )


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"), PermissionError("x"), from_s3fs(PermissionError, 403, "AccessDenied"),
        from_s3fs(OSError, 400, "InvalidBucketName"), from_s3fs(OSError, 416, "InvalidRange"), ValueError("x"),
        from_s3fs(FileExistsError, 412, "PreconditionFailed"), type("NoCredentialsError", (Exception,), {})(),
    ],
)  # fmt: skip
def test_what_stays_as_it_is_is_told_at_once(error: Exception, pauses: list[float]) -> None:
    with pytest.raises(type(error)) as told:
        retries.with_retries(failing(1, error))
    assert told.value is error
    assert not pauses


def test_tries_are_bounded_and_the_last_error_is_told(pauses: list[float]) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise from_s3fs(OSError, 503, "SlowDown")

    with pytest.raises(StoreFailed, match="8 calls failed, the last with OSError: SlowDown"):
        retries.with_retries(call)
    assert len(calls) == retries.MAX_CALLS == 8
    assert sum(pauses) <= 26
    assert max(pauses) <= retries.LONGEST_WAIT_S


@pytest.mark.parametrize("code", ["ExpiredToken", "400"])  # an answer to HEAD has no body to say more in
def test_expired_credentials_are_read_anew(pauses: list[float], code: str) -> None:
    renewed: list[int] = []
    expired = from_s3fs(PermissionError, 400, code)
    assert retries.with_retries(failing(2, expired), lambda: renewed.append(1)) == "done"
    assert len(renewed) == len(pauses) == 2


def test_a_count_loses_nothing_between_threads() -> None:
    count = retries.Counter()
    taken: list[int] = []

    def work() -> None:
        for _ in range(1000):
            count.increment()
            taken.append(count.take_new())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.value == sum(taken) == 4000


def test_a_wait_doubles_with_every_failure_up_to_its_bound() -> None:
    assert [retries.backoff_s(failures, 0.5, 3.0) for failures in (1, 2, 3, 4, 50)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert retries.backoff_s(11, 1.0) == 1024.0
