"""`known_failures.json`: the failures of the last whole run that did not fail, so that they do not count again.

Known are bad rows, by their values and their error, and concepts with bad input, by their fingerprint and their error.
Where a row stands in the manifest does not count. A run whose failures are not tolerated keeps none: a scheduler that
repeats it would otherwise find all of them known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.digest import digest
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from textual_inversion.errors import BAD_INPUT

PATH = "known_failures.json"


def key_of(failure: BadRow | ConceptRecord) -> str:
    """Return the digest by which a later run knows the failure; empty for one that may pass by itself, such as a lost
    worker or a file that cannot be read."""
    if isinstance(failure, BadRow):
        parts = [failure.content, failure.reason] if failure.content else []
    else:
        parts = [failure.fingerprint, failure.error] if failure.error_kind == BAD_INPUT else []
    return digest(parts, escape_non_ascii=True) if parts else ""  # an error may quote a name that is not UTF-8


def read_known(store: RunStore) -> frozenset[str]:
    """Return the keys of the failures that the last whole run tolerated; none if there was no such run.

    Raises ValueError if the file is not one that `write_known` wrote.
    """
    try:
        content = store.get(PATH)
    except FileNotFoundError:
        return frozenset()
    try:
        return frozenset(json.loads(content)["keys"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{store.uri(PATH)} cannot be read ({error}); delete it: the next run writes another"
        ) from error


def write_known(store: RunStore, keys: Iterable[str]) -> None:
    """Replace the file by one with these keys; empty keys are left out."""
    store.put(PATH, json.dumps({"keys": sorted(set(keys) - {""})}).encode())
