"""Name the trouble of a store in one line with the remedy, and say whether the same command would meet it again."""

from __future__ import annotations

import errno

from pipeline.store import retries
from pipeline.store.errors import StoreFailed, is_client_error
from pipeline.store.redact import foreign_text

_BY_CODE = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the address",
    "InvalidAccessKeyId": "the store does not know these credentials: correct them (AWS_ACCESS_KEY_ID)",
    "SignatureDoesNotMatch": "the store refuses these credentials: correct them (AWS_SECRET_ACCESS_KEY)",
    "RequestTimeTooSkewed": "the clock of this machine differs too much from the store's: set it right",
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        "the bucket is in another region: set AWS_REGION and AWS_DEFAULT_REGION to it",
    ),
}
"""Remedies by the code in S3's answer."""

_BY_TYPE = dict.fromkeys(
    ("NoCredentialsError", "PartialCredentialsError"),
    "give the store's client credentials, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
"""Remedies by the class of a client's error."""

_BY_ERRNO = {
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
        "a file lies where a folder must be, or a folder where a file must be: move it, or choose another place",
    ),
}
"""Remedies by the number of an operating system's error."""

_NO_RIGHT = "there is no right to read or write it: change the rights or the credentials, or choose another place"
_PASSING = {errno.ENOSPC, errno.EDQUOT}


def describe_trouble(error: BaseException) -> str:
    """Return what is wrong with a store and what to do, in one line without credentials."""
    if isinstance(error, ImportError):
        return foreign_text(f"a package is missing: {error}")
    if isinstance(error, StoreFailed):
        return foreign_text(f"storage failed: {error}; nothing done is lost, run the same command again")
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = next(iter(said.splitlines()), "").strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {text}"
    remedy = _BY_CODE.get(retries.error_code(error), "") or _BY_TYPE.get(type(error).__name__, "")
    if not remedy and isinstance(error, PermissionError):
        remedy = _NO_RIGHT
    if not remedy and isinstance(error, OSError):
        remedy = _BY_ERRNO.get(error.errno or 0, "")
    if not remedy and not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    return foreign_text(f"{text}; {remedy}" if remedy else text)


def is_of_store(error: BaseException) -> bool:
    """Return whether an exception is one that a store or its client raises, or the lack of that client."""
    return isinstance(error, OSError | ImportError) or is_client_error(error)


def is_lasting(error: BaseException) -> bool:
    """Return whether the same command meets the same error until somebody mends its cause."""
    if isinstance(error, StoreFailed):
        return False
    if isinstance(error, OSError) and error.errno in _PASSING:
        return False
    return not retries.is_retryable(error) or (isinstance(error, OSError) and error.errno in _BY_ERRNO)
