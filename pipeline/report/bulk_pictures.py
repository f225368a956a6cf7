"""The bulk pictures of a run, as the metadata rows of the drawing stage name them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pyarrow as pa

from pipeline.ledger.prune import METADATA
from pipeline.report.spool import DrawnPicture
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import iter_batches
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

_FOLDER = "images/"
_COLUMNS = ("concept_id", "fingerprint", "prompt", "seed", "status", "error", "path")


def read_pictures(store: RunStore) -> Iterator[DrawnPicture]:
    """Yield every bulk picture of an output, part by part. A part that cannot be read is left out, with a warning."""
    for path in sorted(store.list(METADATA)):
        try:
            with open_for_reading(store.uri(path)) as file:
                for batch in iter_batches(file, _COLUMNS):
                    yield from map(_picture, batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            log.warning("the report does not show the pictures of %s: %s", store.uri(path), error)


def _picture(row: dict[str, str | int | None]) -> DrawnPicture:
    path = str(row["path"] or "")
    if not path.startswith(_FOLDER) or ".." in path.split("/"):
        path = ""  # it is packed into its part, or the row is not ours
    error = "" if row["status"] == "ok" else str(row["error"] or "not drawn")
    return DrawnPicture(
        str(row["concept_id"]),
        str(row["fingerprint"]),
        str(row["prompt"]),
        int(row["seed"] or 0),
        path,
        error,
    )
