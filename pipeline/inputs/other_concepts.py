"""Read the other concepts that the quality gate compares sample pictures with."""

from __future__ import annotations

import logging

from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.store.redact import redact
from textual_inversion.concept import Concept

log = logging.getLogger(__name__)

MAX_PHOTOS = 5_000
"""Photos that every actor reads before its first concept ends."""


def read_others(manifest: str) -> list[Concept]:
    """Return the concepts of a manifest; none for an empty address. Rows that describe no concept are left out, and
    logged.

    Raises ValueError if the manifest cannot be read, or has no concept or more photos than MAX_PHOTOS, and OSError if
    it is not there.
    """
    if not manifest:
        return []
    found: list[Concept] = []
    photos = 0
    for row in read_manifest(manifest):
        if isinstance(row, BadRow):
            log.warning("gate.others: row %d of %s is left out: %s", row.row, row.file, row.reason)
            continue
        found.append(row.concept)
        photos += len(row.concept.images)
        if photos > MAX_PHOTOS:
            raise ValueError(
                f"gate.others = {redact(manifest)!r} has more than {MAX_PHOTOS:,} photos, which every actor would "
                "read; give a manifest of fewer concepts, such as one of each kind"
            )
    if not found:
        raise ValueError(f"gate.others = {redact(manifest)!r} has no concept")
    return found
