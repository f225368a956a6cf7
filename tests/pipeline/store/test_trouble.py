"""Troubles of stores in one line, and whether they last."""

from __future__ import annotations

import errno
import os

import botocore.exceptions
import pytest
from s3fs.errors import translate_boto_error

from pipeline.store.errors import StoreFailed
from pipeline.store.trouble import describe_trouble, is_lasting, is_of_store


def local(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/out/lease.json")


def answered(code: str, status: int, message: str = "as S3 says it") -> BaseException:
    """Return the error that s3fs raises for an answer of S3."""
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: BaseException = translate_boto_error(botocore.exceptions.ClientError(answer, "PutObject"))
    return error


@pytest.mark.parametrize(
    ("error", "lasts", "said"),
    [
        (local(errno.ENOTDIR), True, "/out/lease.json: Not a directory; a file lies where a folder must be"),
        (local(errno.EEXIST), True, "/out/lease.json: File exists; a file lies where a folder must be"),
        (local(errno.EROFS), True, "/out/lease.json: Read-only file system; the file system is read-only"),
        (local(errno.EACCES), True, "/out/lease.json: Permission denied; there is no right"),
        (local(errno.ENOENT), True, "/out/lease.json: No such file or directory"),
        (local(errno.ENOSPC), False, "/out/lease.json: No space left on device; the disk is full"),
        (local(errno.EDQUOT), False, "the quota is used up"),
        (local(errno.EIO), False, "/out/lease.json: Input/output error"),
        (ImportError("Please install gcsfs to access Google Storage"), True, "a package is missing: Please"),
        (answered("NoSuchBucket", 404), True, "as S3 says it; the bucket does not exist"),
        (answered("PermanentRedirect", 301), True, "the bucket is in another region: set AWS_REGION"),
        (answered("301", 301), True, "the bucket is in another region"),
        (answered("AuthorizationHeaderMalformed", 400), True, "the bucket is in another region"),
        (answered("IllegalLocationConstraintException", 400), True, "the bucket is in another region"),
        (answered("InvalidAccessKeyId", 403), True, "the store does not know these credentials"),
        (answered("RequestTimeTooSkewed", 403), True, "the clock of this machine differs too much"),
        (answered("SignatureDoesNotMatch", 403), True, "the store refuses these credentials"),
        (answered("AccessDenied", 403), True, "there is no right"),
        (answered("SlowDown", 503), False, "as S3 says it"),
        (botocore.exceptions.NoCredentialsError(), True, "Unable to locate credentials; give the store"),
        (botocore.exceptions.ProfileNotFound(profile="night"), True, "ProfileNotFound: The config profile (night)"),
        (StoreFailed("8 calls failed, the last with SlowDown"), False, "storage failed: 8 calls failed"),
        (OSError("s3://key:pw@bucket/x\nand more"), False, "s3://***@bucket/x"),
    ],
)  # fmt: skip
def test_one_line_with_the_remedy(error: BaseException, lasts: bool, said: str) -> None:
    assert is_of_store(error)
    assert is_lasting(error) is lasts
    text = describe_trouble(error)
    assert said in text
    assert "\n" not in text
    assert "pw@" not in text


def test_a_mistake_in_the_code_is_no_trouble_of_a_store() -> None:
    assert not is_of_store(KeyError("x"))
