"""Errors as one line."""

from __future__ import annotations

import pytest

from pipeline.store.errors import describe_error


class Remote(Exception):
    """As Ray hands over what an actor raised."""

    def __init__(self, text: str, cause: Exception | None = None) -> None:
        super().__init__(text)
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("the bucket\ndoes not answer"), "OSError: the bucket"),
        (ValueError(), "ValueError"),
        (Remote("long\ntraceback", KeyError("x")), "KeyError: 'x'"),
        (Remote("failed: ray::A.__init__() (pid=1)\n  File\nValueError: no model"), "Remote: ValueError: no model"),
        (Remote("The actor died.\nclass_name: Learner"), "Remote: The actor died."),
    ],
)  # fmt: skip
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert describe_error(error) == line
