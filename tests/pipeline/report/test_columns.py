"""The columns of the list: which there are, in which order, and what is offered to choose from."""

from __future__ import annotations

from pipeline.ledger.records import ConceptRecord
from pipeline.report.columns import CARRIED, MAX_CARRIED, MAX_CHOICES, Columns, values_of


def test_columns_stand_in_the_order_of_their_kind() -> None:
    record = ConceptRecord(
        concept_id="duck",
        fingerprint="f",
        status="done",
        placeholder_token="<duck>",
        scores={"clip_i": 0.5, "clip_i_initializer": 0.25, "another": 1.0, "clip_i_photos": 0.9},
        carried={"sku": 7},
    )
    columns = Columns()
    shown = columns.add(values_of(record))
    names = [column.name for column in columns.in_order()]
    assert [name for name in names if name in record.scores or name == "clip_i_gain"] == [
        "clip_i", "clip_i_gain", "clip_i_initializer", "clip_i_photos", "another",
    ]  # fmt: skip
    assert (names[0], names[-1]) == ("concept", "carried:sku")
    assert shown["clip_i_gain"] == 0.25
    assert "error" not in names, "no row has one"


def test_few_texts_are_a_choice_and_numbers_are_a_range() -> None:
    columns = Columns()
    for number in range(MAX_CHOICES + 1):
        columns.add({"few": "ab"[number % 2], "many": f"text {number}", "number": number, "mixed": number or "none"})
    described = {column.name: column.describe() for column in columns.in_order()}
    assert described["few"]["choices"] == [("a", 26), ("b", 25)]
    assert described["many"]["choices"] is None
    assert [described[name]["number"] for name in ("few", "number", "mixed")] == [False, True, False]


def test_values_are_bounded() -> None:
    columns = Columns()
    long = columns.add({"text": "x" * 1000, "yes": True, "infinite": float("inf"), "list": [1, 2], "none": None})
    assert long == {"text": "x" * 199 + "…", "yes": "true", "infinite": "inf", "list": "[1, 2]"}
    columns.add({f"{CARRIED}{number}": number for number in range(MAX_CARRIED + 3)})
    assert columns.num_left_out == 3
    assert sum(column.name.startswith(CARRIED) for column in columns.in_order()) == MAX_CARRIED
