"""`vectors.parquet`: the learned rows of all concepts, one table row a vector, as vector databases load them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.ledger.records import ConceptRecord
from pipeline.report_config import VectorType
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

PATH = "vectors.parquet"
_BATCH = 500


def write_vectors(store: RunStore, records: Iterable[ConceptRecord], number_type: VectorType) -> int:
    """Write the table of the concepts that are done, and return its number of rows.

    Columns: `concept_id`, `fingerprint`, `encoder` (the text encoder's key), `index` (of the vector, from 0) and
    `vector`, a list of `number_type`. Memory holds one batch of concepts and the table. An embedding that cannot be
    read is left out with a warning.
    """
    is_half = number_type == "float16"
    schema = pa.schema(
        [
            ("concept_id", pa.string()),
            ("fingerprint", pa.string()),
            ("encoder", pa.string()),
            ("index", pa.int32()),
            ("vector", pa.list_(pa.float16() if is_half else pa.float32())),
        ]
    )
    done = (record for record in records if record.status == "done")
    buffer = io.BytesIO()
    num_rows = 0
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        while batch := list(islice(done, _BATCH)):
            contents = store.get_many(record.result.embedding for record in batch)
            rows = [row for record in batch for row in _rows(record, contents, np.float16 if is_half else np.float32)]
            columns = {name: [row[name] for row in rows] for name in schema.names}
            writer.write_table(pa.table([pa.array(columns[each.name], each.type) for each in schema], schema))
            num_rows += len(rows)
    store.put(PATH, buffer.getvalue())
    return num_rows


def vectors_in(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Return the rows in an embedding's file by text encoder key, [vectors, dim].

    Raises ValueError for bytes that are no such file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not a safetensors file of floats: {error}") from error
    if "text_encoder" in header and len(tensors) == 1:  # the key is the placeholder token
        return {header["text_encoder"]: next(iter(tensors.values()))}
    return tensors


def _rows(
    record: ConceptRecord, contents: dict[str, bytes | OSError], number_type: type[np.floating[Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one concept."""
    content = contents[record.result.embedding]
    try:
        if isinstance(content, OSError):
            raise content
        vectors = vectors_in(content)
    except (OSError, ValueError) as error:
        log.warning("%s has no vectors of %s: %s", PATH, record.concept_id, redact(str(error)))
        return
    for encoder, rows in sorted(vectors.items()):
        for index, vector in enumerate(rows.astype(number_type)):
            key = {"concept_id": record.concept_id, "fingerprint": record.fingerprint, "encoder": encoder}
            yield {**key, "index": index, "vector": vector}
