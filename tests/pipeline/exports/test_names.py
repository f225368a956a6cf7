"""Names of exported files: one for each concept, on any file system, and never a word of the model."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from pipeline.exports.names import file_names

_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def test_a_name_says_which_concept_it_is() -> None:
    assert file_names(["tiger", "A-7_b", "v1.2"]) == {"tiger": "tiger-ti", "A-7_b": "A-7_b-ti", "v1.2": "v1-2-ti"}


def test_ids_that_look_alike_are_numbered_in_alphabetic_order() -> None:
    found = file_names(["tiger", "Tiger", "v1.2", "v1-2", "-.-"])
    assert found == {
        "Tiger": "Tiger-ti", "tiger": "tiger-2-ti", "v1-2": "v1-2-ti", "v1.2": "v1-2-2-ti", "-.-": "concept-ti",
    }  # fmt: skip
    assert file_names(["Tiger", "tiger", "tiger-2"])["tiger-2"] == "tiger-2-2-ti"


def test_a_word_of_the_vocabulary_is_no_name() -> None:
    assert file_names(["multi"], {"multi-ti", "multi-2-ti"}.__contains__) == {"multi": "multi-3-ti"}


@given(st.lists(st.text("ABZabz019._-", min_size=1, max_size=128), max_size=8))
def test_any_ids_give_names_that_any_file_system_takes(ids: list[str]) -> None:
    found = file_names(ids)
    assert found.keys() == set(ids)
    assert len({name.lower() for name in found.values()}) == len(found)
    for name in found.values():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*-ti", name)
        assert len(name) < 100
        assert not _RESERVED.fullmatch(name)
    assert file_names(reversed(ids)) == found
