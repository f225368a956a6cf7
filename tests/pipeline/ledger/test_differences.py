from __future__ import annotations

from typing import Any

import pytest

from pipeline.ledger.differences import input_differences, settings_differences, tree_differences

BEFORE: dict[str, Any] = {"concept": {"initializer": "cat", "num_vectors": 1}, "images": ["1", "2"], "settings": "s"}
WERE = ("a.png", "b.png")


@pytest.mark.parametrize(
    ("change", "addresses", "expected"),
    [
        ({}, WERE, []),
        ({}, ("s3://moved/a.png", "s3://moved/b.png"), []),
        ({"images": ["2", "1"]}, ("b.png", "a.png"), ["photos: the same in another order"]),
        ({"images": ["1", "3"]}, WERE, ["photo 2 has other bytes: b.png"]),
        ({"images": ["1", "3"]}, ("a.png", "c.png"), ["photo 2 is new: c.png", "a photo is gone: b.png"]),
        ({"images": ["1"]}, ("a.png",), ["a photo is gone: b.png", "photos: 2 before, 1 now"]),
        ({"images": ["1", "2", "2"]}, ("a.png", "b.png", "c.png"), ["photos: 2 before, 3 now"]),
        ({"masks": ["5", "6"]}, WERE, ["masks: 0 before, 2 now"]),
        (
            {"concept": {"initializer": "cat", "num_vectors": 2, "captions": ["a {}"]}},
            WERE,
            ["row: num_vectors: 1 -> 2", 'row: captions: nothing -> ["a {}"]'],
        ),
    ],
)
def test_inputs(change: dict[str, Any], addresses: tuple[str, ...], expected: list[str]) -> None:
    assert input_differences(BEFORE, {**BEFORE, **change}, WERE, addresses) == expected


def test_masks_of_the_same_number() -> None:
    before, now = ({**BEFORE, "masks": masks} for masks in (["5", "6"], ["6", "5"]))
    assert input_differences(before, now, WERE, WERE) == ["masks: other bytes, or another order"]


def test_settings_by_field_and_hashes_by_what_they_are_of() -> None:
    before = {"inversion": {"steps": 500, "prompts": ("a", "b")}, "model": "0" * 32, "extractor": "1"}
    now = {"inversion": {"steps": 800, "prompts": ["a", "b"]}, "model": "f" * 32, "extractor": "1"}
    assert settings_differences(before, now) == ["inversion.steps: 500 -> 800", "the model's files (model)"]


def test_long_values_are_cut() -> None:
    (line,) = tree_differences({"text": "x" * 1000}, {"text": "y"})
    assert len(line) < 120
