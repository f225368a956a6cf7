from __future__ import annotations

import numpy as np

from pipeline.ledger.key_index import KeyIndex, KeySet, digest_words


def test_every_key_is_found_in_its_row_and_no_other() -> None:
    names = [f"row {number}" for number in range(1000)]
    index = KeyIndex(digest_words(names))
    assert len(index) == 1000
    assert index.find(digest_words(reversed(names))).tolist() == list(range(999, -1, -1))
    assert index.find(digest_words(["other", "row 7", ""])).tolist() == [-1, 7, -1]
    assert index.has_first(digest_words(["other", "row 7"])).tolist() == [False, True]


def test_keys_of_one_first_word_are_told_apart_and_the_last_of_equal_ones_counts() -> None:
    keys = np.array([[5, 1], [5, 2], [9, 9], [5, 1], [5, 3]], np.uint64)
    index = KeyIndex(keys)
    asked = np.array([[5, 1], [5, 2], [5, 3], [5, 4], [9, 9], [9, 8], [0, 0], [2**64 - 1, 0]], np.uint64)
    assert index.find(asked).tolist() == [3, 1, 4, -1, 2, -1, -1, -1]
    assert index.has_first(asked).tolist() == [True] * 6 + [False] * 2


def test_an_empty_index_has_nothing() -> None:
    index = KeyIndex(digest_words([]))
    assert index.find(digest_words(["x"])).tolist() == [-1]
    assert index.has_first(digest_words(["x"])).tolist() == [False]
    assert index.find(digest_words([])).tolist() == []


def test_a_set_grows_and_says_which_keys_are_new() -> None:
    names = [f"key {number}" for number in range(1000)]
    found = KeySet()
    assert found.add(digest_words([])).tolist() == []
    assert not found
    for first in range(0, 1000, 37):
        new = names[first : first + 37]
        asked = [*names[max(0, first - 5) : first], *new, new[0]]
        assert found.add(digest_words(asked)).tolist() == [name in new for name in asked[:-1]] + [False]
        assert len(found) == first + len(new)
    assert found.has(digest_words(names)).all()
    assert found.has(digest_words(["other", "key 1000", "key 7"])).tolist() == [False, False, True]


def test_a_set_without_the_keys_of_another() -> None:
    some, other = KeySet(), KeySet()
    for name in "abcde":
        some.add(digest_words([name]))
    other.add(digest_words("bdx"))
    rest = some.minus(other)
    assert rest.has(digest_words("abcdex")).tolist() == [True, False, True, False, True, False]
    assert (len(rest), len(some.minus(some)), len(some.minus(KeySet()))) == (3, 0, 5)
