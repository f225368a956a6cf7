"""Read Parquet files on the calling thread alone.

pyarrow's readers use threads that hold the Python file they read from. When the interpreter ends before such a thread
has let go of the file, the process dies with SIGABRT ("terminate called without an active exception", seen with pyarrow
26): after its work is done, with exit code 134. `ParquetFile` starts no thread with `use_threads=False` and
`pre_buffer=False` (either alone is not enough). The linter forbids pyarrow's own readers everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

DEFAULT_BATCH_ROWS = 65_536


def read_table(source: str | Path | IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file: all its columns, or `columns` in the order given.

    Raises pyarrow.ArrowInvalid if it is not Parquet or lacks a column, and OSError if it cannot be read.
    """
    with pq.ParquetFile(source, pre_buffer=False) as file:  # noqa: TID251
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise pa.ArrowInvalid(f"there is no column {', '.join(map(repr, sorted(missing)))}")
        table = file.read(columns, use_threads=False)
    return table if columns is None else table.select(columns)


def read_tables(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all Parquet files of a local folder, in the order of their names, as one table."""
    return pa.concat_tables([read_table(path, columns) for path in sorted(folder.glob("*.parquet"))])


def iter_batches(
    source: str | Path | IO[bytes], columns: Sequence[str] | None = None, batch_rows: int = DEFAULT_BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file's rows, at most `batch_rows` at a time."""
    file = pq.ParquetFile(source, pre_buffer=False)  # noqa: TID251
    yield from file.iter_batches(batch_rows, columns=columns, use_threads=False)
