from __future__ import annotations

from typing import get_args

import pytest

from pipeline.report.failures import STAGE, UNKNOWN, Cause, find_causes, group_by_kind, remedy_of, title_of
from textual_inversion.errors import BAD_INPUT, BUG, STORAGE, ErrorKind


def test_causes_that_differ_in_numbers_or_the_concepts_name_are_one() -> None:
    failures = [
        (BAD_INPUT, "row 3", "", "3 photos are missing"),
        (BAD_INPUT, "cat", "cat", "photo s3://b/cat/1.png: cut off after 12 bytes"),
        (BAD_INPUT, "dog", "dog", "photo s3://b/dog/2.png: cut off after 999 bytes"),
    ]
    first, second = find_causes(failures)
    assert (first.cause, first.names, first.count) == (failures[1][3], ("cat", "dog"), 2)
    assert (second.names, second.count) == (("row 3",), 1)


def test_one_text_of_two_kinds_is_two_causes() -> None:
    causes = find_causes([(STORAGE, "a", "a", "no answer"), (BUG, "b", "b", "no answer"), ("", "c", "c", "no answer")])
    assert {(cause.kind, cause.names) for cause in causes} == {(STORAGE, ("a",)), (BUG, ("b",)), (UNKNOWN, ("c",))}


def test_names_are_bounded_and_counts_are_not() -> None:
    (cause,) = find_causes([("", f"c{i}", f"c{i}", "out of memory") for i in range(1000)])
    assert (len(cause.names), cause.count) == (200, 1000)
    assert find_causes([]) == []


def test_kinds_come_before_causes_and_the_kind_with_the_most_failures_first() -> None:
    causes = [
        Cause(STORAGE, "no answer", ("a",), 5),
        Cause(BUG, "shapes differ", ("b",), 4),
        Cause(BUG, "no such key", ("c",), 3),
        Cause(BAD_INPUT, "no photo", ("d",), 1),
    ]
    groups = group_by_kind(causes, 3)
    assert [(group.kind, group.count) for group in groups] == [(BUG, 7), (STORAGE, 5)]
    assert [cause.cause for cause in groups[0].causes] == ["shapes differ", "no such key"]
    assert [group.count for group in group_by_kind(causes, 1)] == [5], "a kind without a cause to show has no group"


@pytest.mark.parametrize("kind", [*get_args(ErrorKind), STAGE, UNKNOWN, "of_a_newer_release"])
def test_every_kind_has_a_title_and_a_remedy(kind: str) -> None:
    assert title_of(kind)
    assert "_" not in title_of(kind)
    assert remedy_of(kind)
    assert title_of(UNKNOWN) == "unknown kind"
