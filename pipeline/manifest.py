"""`python -m pipeline.manifest PHOTOS --output MANIFEST.parquet`: write a Parquet manifest of photos or of a table.

PHOTOS is whatever `python -m pipeline.run` takes: a folder of photos (one concept), a folder with a folder of photos
for each concept, or a CSV, JSON lines or Parquet file. The manifest holds the rows that a run would read, with absolute
addresses, so that it means the same wherever it lies. Bad rows are printed and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import posixpath
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exit_codes import FAILED, OK
from pipeline.inputs.manifest import BadRow, ManifestRow, manifest_notes, read_manifest
from pipeline.report.command_errors import exit_code_of
from pipeline.report.logs import configure_logs
from pipeline.report.run_summary import describe_bad_row
from pipeline.store.addresses import absolute, absolute_output
from pipeline.store.errors import one_line
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore

_SCHEMA = pa.schema(
    [
        ("concept_id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("placeholder", pa.string()),
        ("initializer", pa.string()),
        ("category", pa.string()),
        ("num_vectors", pa.int32()),
        ("masks", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("start_from", pa.string()),
    ]
)


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.manifest") -> int:
    """Run the command; return 1 if rows were left out, 2 if there is no manifest to write."""
    configure_logs()
    options = parse(arguments, prog)
    return exit_code_of(lambda: write_manifest(options))


def parse(arguments: list[str] | None, prog: str = "python -m pipeline.manifest") -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", metavar="PHOTOS", help="folder of photos, or table; any fsspec URI")
    parser.add_argument("--output", metavar="URI", required=True, help="Parquet file to write; any fsspec URI")
    parser.add_argument("--initializer", metavar="WORD", help="word for what the photos show, in rows without one")
    parser.add_argument(
        "--style", action="store_true", help="the photos share a style to learn, not an object (category `style`)"
    )
    return parser.parse_args(arguments)


def write_manifest(options: argparse.Namespace) -> int:
    """Write the manifest, print what was written and left out, and return the exit code. Raises ValueError if the
    input is no manifest or the output cannot be one."""
    source, output = absolute(options.photos), absolute_output(options.output)
    if not output.endswith(".parquet"):
        raise ValueError(f"--output {redact(output)!r} must end with .parquet")
    if output.startswith(f"{source}/"):
        raise ValueError(
            f"--output {redact(output)!r} lies in {redact(source)}, which would be read as that table from then on; "
            "name another place"
        )
    notes = manifest_notes(source)
    rows = list(read_manifest(source))
    bad = [row for row in rows if isinstance(row, BadRow)]
    good = [_with_defaults(row, options) for row in rows if isinstance(row, ManifestRow)]
    if not good:
        raise ValueError(f"{redact(source)} has no good row" + (f": {describe_bad_row(bad[0])}" if bad else ""))
    folder, name = posixpath.split(output)
    RunStore(folder).put(name, to_parquet(good))
    if not options.initializer:
        sys.stdout.write("".join(f"note: {note}\n" for note in notes))
    sys.stdout.write("".join(one_line(f"bad row: {describe_bad_row(row)}") + "\n" for row in bad))
    num_photos = sum(len(row.concept.images) for row in good)
    sys.stdout.write(f"{len(good)} concepts with {num_photos} photos, {len(bad)} bad rows; {redact(output)}\n")
    return FAILED if bad else OK


def _with_defaults(row: ManifestRow, options: argparse.Namespace) -> ManifestRow:
    """Return a row with the command line's values where it has none."""
    concept = row.concept
    if options.initializer and not concept.initializer:
        concept = dataclasses.replace(concept, initializer=options.initializer)
    if options.style:
        concept = dataclasses.replace(concept, category="style")
    return dataclasses.replace(row, concept=concept)


def to_parquet(rows: Sequence[ManifestRow]) -> bytes:
    """Return a Parquet file of the rows. A carried column keeps its type where Arrow finds one for all its values;
    otherwise each value is JSON text."""
    columns: dict[str, pa.Array] = {}
    for name, column_type in zip(_SCHEMA.names, _SCHEMA.types, strict=True):
        attribute = "placeholder_token" if name == "placeholder" else name
        values = [getattr(row.concept, attribute) for row in rows]
        columns[name] = pa.array([list(value) if isinstance(value, tuple) else value for value in values], column_type)
    for name in dict.fromkeys(name for row in rows for name in row.carried):
        columns[name] = _carried_array([row.carried.get(name) for row in rows])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def _carried_array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array(
            [None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pa.string()
        )


if __name__ == "__main__":
    sys.exit(main())
