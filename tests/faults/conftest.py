"""The S3 server of the pipeline's tests."""

from tests.pipeline.conftest import bucket, s3_server

__all__ = ["bucket", "s3_server"]
