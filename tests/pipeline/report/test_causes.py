from __future__ import annotations

from pipeline.report.overview import by_cause


def test_causes_that_differ_in_numbers_or_the_concepts_name_are_one() -> None:
    failures = [
        ("row 3", "", "3 photos are missing"),
        ("cat", "cat", "photo s3://b/cat/1.png: cut off after 12 bytes"),
        ("dog", "dog", "photo s3://b/dog/2.png: cut off after 999 bytes"),
    ]
    first, second = by_cause(failures)
    assert (first.cause, first.names, first.count) == (failures[1][2], ("cat", "dog"), 2)
    assert (second.names, second.count) == (("row 3",), 1)


def test_names_are_bounded_and_counts_are_not() -> None:
    (cause,) = by_cause((f"c{i}", f"c{i}", "out of memory") for i in range(1000))
    assert (len(cause.names), cause.count) == (200, 1000)
    assert by_cause([]) == []
