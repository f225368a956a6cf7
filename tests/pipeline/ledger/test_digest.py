"""Digests of values that outputs already hold may not change."""

from __future__ import annotations

from pipeline.ledger.digest import digest


def test_the_digest_of_a_value_is_what_it_was() -> None:
    assert digest(["f", "ein Foto", 7, {"steps": 2}]) == "ae13e8e9c2fefb3e4fe8874be5e783fe"
    assert digest(["f", "猫の写真", 7, {"steps": 2}]) == "144b3c13c2111e97b53827e9ed01f7b5"


def test_the_order_of_keys_does_not_count() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_escapes_count_where_there_is_something_to_escape() -> None:
    assert digest("cat", escape_non_ascii=True) == digest("cat")
    assert digest("猫", escape_non_ascii=True) != digest("猫")
