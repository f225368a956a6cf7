"""A map of learned concepts: their rows, projected on the two directions in which they differ most."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.ledger.vectors import vectors_in
from pipeline.store.storage import ConceptFolder, RunStore

log = logging.getLogger(__name__)

_BATCH = 200
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """Places of concepts on the plane of the first two principal components of their rows."""

    points: Sequence[tuple[int, float, float]]
    """The concept's position on the page, and its place; both coordinates are between 0 and 1, on one scale."""
    shares: tuple[float, float]
    """Share of the rows' variance along each direction."""


def positions_on_map(num_done: int, most: int) -> Sequence[int]:
    """Return the positions of at most `most` of the first `num_done` concepts, evenly spread."""
    count = min(num_done, most)
    return [place * num_done // count for place in range(count)] if count else []


def read_map(store: RunStore, folders: Mapping[int, ConceptFolder]) -> EmbeddingMap | None:
    """Return the map of the concepts whose embeddings can be read, position -> folder; None for fewer than three.

    The vector of a concept is the mean of its rows, for several text encoders one behind the other. Concepts whose
    vectors are of another length than most are left out.
    """
    vectors = dict(_vectors(store, folders))
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


def _vectors(store: RunStore, folders: Mapping[int, ConceptFolder]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield position and vector of every concept whose embedding can be read."""
    num_unread = 0
    wanted = list(folders.items())
    for start in range(0, len(wanted), _BATCH):
        batch = wanted[start : start + _BATCH]
        contents = store.get_many(folder.embedding for _, folder in batch)
        for position, folder in batch:
            vector = _vector(contents[folder.embedding])
            if vector is None:
                num_unread += 1
            else:
                yield position, vector
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
