"""Names of exported files, which most tools take as the words of prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

SUFFIX = "-ti"
"""Ending of every name. It keeps a name from being a word of the model's vocabulary, which the tools would replace in
every prompt, and from being a name that Windows reserves, such as `con`."""

_MAX_CHARACTERS = 80


def file_names(concept_ids: Iterable[str], is_word: Callable[[str], bool] = lambda _: False) -> dict[str, str]:
    """Return a name for each concept's files, without an ending: concept id -> name.

    The names hold letters a-z of either case, digits, `-` and `_`, and differ in more than upper and lower case. Of
    ids that would give the same name, the first in alphabetic order has the plain one, and the others a number.
    `is_word` tells whether a name is a word of the model's vocabulary.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for concept_id in sorted(set(concept_ids)):
        stem = re.sub(r"[^A-Za-z0-9_]+", "-", concept_id).strip("-_")[:_MAX_CHARACTERS] or "concept"
        number = 1
        name = stem + SUFFIX
        while name.lower() in taken or is_word(name):
            number += 1
            name = f"{stem}-{number}{SUFFIX}"
        names[concept_id] = name
        taken.add(name.lower())
    return names
