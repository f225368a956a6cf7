"""Read the prompts of bulk generation: a text file with one prompt a line, or a Parquet table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.store.addresses import absolute, open_for_reading, read_bytes
from pipeline.store.parquet import read_table
from textual_inversion.prompts import HOLE

INITIALIZER = "{initializer}"
"""Hole in a prompt that the concept's initializer fills."""

TOKEN = "{token}"
"""Hole in a prompt that the placeholder token fills, without the class noun."""

_HOLES = re.compile("|".join(map(re.escape, (HOLE, TOKEN))))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt with a hole, and the concepts it is drawn for."""

    text: str
    """Text with `{}` in place of the concept, as it was learned: its placeholder token, and with the class cue its
    class noun behind it. `{token}` is the token alone, and so is the `{}` of `{} {initializer}`, which names the class
    itself. `{initializer}` stands for the concept's initializer (left out for a concept that has none)."""
    concept_id: str | None = None
    """Id of the only concept it is drawn for; None for every concept."""
    category: str | None = None
    """Category of the concepts it is drawn for, `object` or `style`; None for both."""
    seed: int | None = None
    """Seed of the first picture, to which further ones add 1 each; None derives it from the run's seed, the concept and
    the text."""

    def is_for(self, concept_id: str, category: str) -> bool:
        return self.concept_id in (None, concept_id) and self.category in (None, category)

    def filled(self, token: str, initializer: str, prompt_as: str = "") -> str:
        """Return the prompt with a concept in its holes.

        `prompt_as`: text for `{}`, the concept's name in prompts; where it is empty, that is the token.
        """
        text = self.text
        if INITIALIZER in text:
            text = text.replace(f"{HOLE} {INITIALIZER}", f"{TOKEN} {INITIALIZER}")
            text = " ".join(text.replace(INITIALIZER, initializer).split())
        words = {HOLE: prompt_as or token, TOKEN: token}
        return _HOLES.sub(lambda hole: words[hole[0]], text)

    def template(self, initializer: str) -> str:
        """Return the prompt with `{}` for the concept and no other hole."""
        return self.filled(HOLE, initializer)


def read_prompts(uri: str) -> list[Prompt]:
    """Read prompts without duplicates, from Parquet (`.parquet`) with a column `prompt` and optionally `concept_id`,
    `category` and `seed`, or from text, where empty lines and lines that begin with `#` are left out.

    Raises ValueError naming the file and the line or row.
    """
    uri = absolute(uri)
    try:
        prompts = _read_table(uri) if uri.endswith(".parquet") else _read_lines(uri)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise ValueError(f"prompts {uri} cannot be read: {error}") from error
    if not prompts:
        raise ValueError(f"prompts {uri}: there are none in it")
    return list(dict.fromkeys(prompts))


def _read_lines(uri: str) -> list[Prompt]:
    lines = enumerate(read_bytes(uri).decode("utf-8-sig").splitlines(), 1)
    return [
        _parse(f"{uri}, line {number}", {"prompt": line.strip()})
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_table(uri: str) -> list[Prompt]:
    with open_for_reading(uri) as file:
        table = read_table(file)
    if "prompt" not in table.column_names:
        raise ValueError(f"prompts {uri} has no column 'prompt'; it has {', '.join(table.column_names)}")
    return [_parse(f"{uri}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _parse(location: str, row: Mapping[str, Any]) -> Prompt:
    text, concept_id, category, seed = (row.get(name) for name in ("prompt", "concept_id", "category", "seed"))
    if not isinstance(text, str) or not _HOLES.search(text):
        raise ValueError(f"{location}: prompt {text!r} must be text with {{}} where the concept goes")
    if category not in (None, "object", "style"):
        raise ValueError(f"{location}: category {category!r} must be 'object' or 'style', or be left out")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**62):
        raise ValueError(f"{location}: seed {seed!r} must be a whole number, 0 or more and below 2**62")
    return Prompt(text, None if concept_id is None else str(concept_id), category, seed)
