"""Read the descriptions that people gave of the demo's concepts: the "human captions" of Gal et al. 2022, section 5."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "captions.toml"
MOST_WORDS = {"short": 12, "long": 30}
"""Largest number of words of a caption in the paper."""


@cache
def read_captions() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return concept id -> `short` and `long` -> its captions."""
    with FILE.open("rb") as file:
        found = tomllib.load(file)
    return {
        concept_id: {length: tuple(texts) for length, texts in captions.items()}
        for concept_id, captions in found.items()
    }
