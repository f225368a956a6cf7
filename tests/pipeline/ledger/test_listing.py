"""A listing of concepts: the files that it shows, in whatever order its pages come."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.ledger.listing import ConceptListing
from pipeline.store.storage import ConceptFolder, StoredObject

NAMES = ["grid.png", "log.jsonl", "learned_embeds.safetensors"]


def objects() -> dict[tuple[str, str], int]:
    """Return (fingerprint, name) -> bytes of some files; folders lack some of them."""
    numbers = random.Random(0)
    every = [(f"f{folder}", name) for folder in range(60) for name in NAMES]
    return {place: numbers.randrange(10**10) for place in every if numbers.random() < 0.8}


def listed(files: dict[tuple[str, str], int], page: int) -> ConceptListing:
    """Take the files in by pages, shuffled, with other objects among them."""
    found = [StoredObject(f"concepts/c/{key}/{name}", size, 0.0, "v") for (key, name), size in files.items()]
    found += [StoredObject(path, 1, 0.0, "v") for path in ("run.json", "concepts/c/file", "images/c/f1/grid.png")]
    random.Random(1).shuffle(found)
    listing = ConceptListing()
    for first in range(0, len(found), page):
        some = found[first : first + page]
        listing.add_all(
            [each.path for each in some], [each.num_bytes for each in some], [each.version for each in some]
        )
    return listing


@pytest.mark.parametrize("page", [1, 7, 1000])
def test_sizes_are_those_of_the_files(page: int) -> None:
    files = objects()
    listing = listed(files, page)
    keys, names = [f"f{number}" for number in range(-1, 62)], [*NAMES, "other"]
    folders, numbers = np.divmod(np.arange(len(keys) * len(names)), len(names))
    sizes = listing.sizes([key.encode() for key in keys], names, folders, numbers.astype(np.int32))
    assert sizes.tolist() == [files.get((key, name), -1) for key in keys for name in names]


def test_damage_names_the_file() -> None:
    files = objects()
    listing = listed(files, 100)
    for key in ("f3", "f4", "f59"):
        folder = ConceptFolder("c", key)
        described = {name: size for (of, name), size in files.items() if of == key}
        assert listing.damage(folder, described) == ""
        assert listing.damage(folder, described | {"more.bin": 3}) == f"concepts/c/{key}/more.bin is missing"
        name = next(iter(described))
        other = described | {name: described[name] + 1}
        assert f"{folder.file(name)} has {described[name]:,} bytes and not" in listing.damage(folder, other)
    assert listing.damage(ConceptFolder("c", "absent"), {}) == ""
    assert "is missing" in listing.damage(ConceptFolder("c", "absent"), {"grid.png": 1})


def test_of_an_object_that_is_listed_twice_the_later_counts() -> None:
    listing = ConceptListing([StoredObject("concepts/c/f/grid.png", size, 0.0, "") for size in (7, 3, 5)])
    assert listing.damage(ConceptFolder("c", "f"), {"grid.png": 5}) == ""
    listing.add(StoredObject("concepts/c/f/grid.png", 9, 0.0, ""))
    assert listing.damage(ConceptFolder("c", "f"), {"grid.png": 9}) == ""


def test_an_empty_record_does_not_count() -> None:
    paths = ["concepts/a/f1/record.json", "concepts/b/f2/record.json", "concepts/b/f2/failure.json"]
    listing = ConceptListing()
    listing.add_all([*paths, "concepts/b/f3/ladder.json"], [0, 5, 0, 1], ["v"] * 4)
    assert [each.path for each in listing.records.values()] == [paths[1]]
    assert [each.path for each in listing.failures.values()] == [paths[2]]
    assert listing.awaiting_retry == {"f3": "b"}
