"""A map of learned concepts: their rows, projected on the two directions in which they differ most.

On object stores the mean rows are kept in one object, `map.parquet`, so that a report reads only the embeddings that
are new on the map.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ledger.vectors import vectors_in
from pipeline.store.copies import put_copy, read_copy
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

log = logging.getLogger(__name__)

KEPT_PATH = "map.parquet"

_SCHEMA = pa.schema([("embedding", pa.string()), ("mean", pa.list_(pa.float32()))])
_BATCH = 200
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """Places of concepts on the plane of the first two principal components of their rows."""

    points: Sequence[tuple[int, float, float]]
    """The concept's position on the page, and its place; both coordinates are between 0 and 1, on one scale."""
    shares: tuple[float, float]
    """Share of the rows' variance along each direction."""


def read_map(store: RunStore, folders: Mapping[int, ConceptFolder]) -> EmbeddingMap | None:
    """Return the map of the concepts whose embeddings can be read, position -> folder; None for fewer than three.

    The vector of a concept is the mean of its rows, for several text encoders one behind the other. Concepts whose
    vectors are of another length than most are left out.
    """
    kept = _read_kept(store)
    means = {folder.embedding: kept.get(folder.embedding) for folder in folders.values()}
    means |= dict(_vectors(store, [path for path, mean in means.items() if mean is None]))
    vectors = {position: mean for position, folder in folders.items() if (mean := means[folder.embedding]) is not None}
    _keep(store, kept, {path: mean for path, mean in means.items() if mean is not None})
    lengths = Counter(len(vector) for vector in vectors.values())
    if not lengths:
        return None
    ((length, _),) = lengths.most_common(1)
    positions = [position for position, vector in vectors.items() if len(vector) == length]
    if len(positions) < _FEWEST:
        return None
    places, shares = project(np.stack([vectors[position] for position in positions]))
    points = [(position, round(x, 4), round(y, 4)) for position, (x, y) in zip(positions, places.tolist(), strict=True)]
    return EmbeddingMap(points, shares)


def project(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return the places [n, 2] of vectors [n, dim] on the plane of their first two principal components (Pearson 1901),
    scaled to fit between 0 and 1, and the share of their variance along each."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    # The products of the vectors [n, n] have the eigenvalues of their covariance, and n is bounded where dim is not.
    values, axes = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values[::-1][:2], 0.0)
    places = axes[:, ::-1][:, :2] * np.sqrt(values)
    places *= np.where(places.sum(axis=0) + places[0] < 0, -1.0, 1.0)  # an axis has no sign; this one is repeatable
    total = float((centred**2).sum()) or 1.0
    extent = float(np.ptp(places, axis=0).max()) or 1.0
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    return (places - middle) / extent + 0.5, (float(values[0] / total), float(values[1] / total))


def _read_kept(store: RunStore) -> dict[str, NDArray[np.float32]]:
    """Return the mean rows that the last report kept, by the embedding's path."""
    table = read_copy(store, KEPT_PATH, lambda content: read_table(io.BytesIO(content), _SCHEMA.names).cast(_SCHEMA))
    if table is None:
        return {}
    means = (np.array(mean, np.float32) for mean in table["mean"].to_pylist())
    return dict(zip(table["embedding"].to_pylist(), means, strict=True))


def _keep(store: RunStore, kept: Mapping[str, NDArray[np.float32]], means: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace the kept mean rows by `means`, if they are of other embeddings."""
    if not store.is_remote or kept.keys() == means.keys():
        return
    buffer = io.BytesIO()
    rows = [{"embedding": path, "mean": mean.tolist()} for path, mean in means.items()]
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer, compression="zstd")
    put_copy(store, KEPT_PATH, buffer.getvalue())


def _vectors(store: RunStore, paths: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield path and mean row of every embedding that can be read."""
    num_unread = 0
    for start in range(0, len(paths), _BATCH):
        for path, content in store.get_many(paths[start : start + _BATCH]).items():
            vector = _vector(content)
            if vector is None:
                num_unread += 1
            else:
                yield path, vector
    if num_unread:
        log.warning("%d embeddings cannot be read; their concepts are not on the report's map", num_unread)


def _vector(content: bytes | OSError) -> NDArray[np.float32] | None:
    """Return the mean row of an embedding's file; None if it cannot be read."""
    if isinstance(content, OSError):
        return None
    try:
        by_encoder = vectors_in(content)
        means = [np.atleast_2d(by_encoder[key]).mean(axis=0, dtype=np.float32) for key in sorted(by_encoder)]
    except (ValueError, TypeError):
        return None
    return np.concatenate(means) if means and all(np.isfinite(mean).all() for mean in means) else None
