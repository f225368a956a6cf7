"""The drawing of a learning curve: from its Parquet (step, loss, norm) to the points of SVG lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.store.parquet import read_table

WIDTH, HEIGHT = 240, 90
"""Size of the drawing, in SVG units."""

_BINS = 60
_NAMES = ("step", "loss", "norm")


@dataclass(frozen=True, slots=True)
class Curve:
    """A drawing: SVG point lists, and the values in its labels."""

    band: str
    """Outline of the band between the lowest and the highest loss around each step."""
    loss: str
    """Mean loss."""
    norm: str
    """Mean norm of the rows, on a scale of its own that begins at 0."""
    last_step: int
    low: float
    high: float
    """End of the loss scale; `low` is its start."""
    last_norm: float


def read_curve(data: bytes) -> Curve | None:
    """Draw a curve from its Parquet; return None if it has fewer than two finite points."""
    table = read_table(io.BytesIO(data), _NAMES)
    rows = [row for row in zip(*(column.to_pylist() for column in table.columns), strict=True) if _finite(row)]
    if len(rows) < 2:
        return None
    per_bin = math.ceil(len(rows) / _BINS)
    bins = [rows[i : i + per_bin] for i in range(0, len(rows), per_bin)]
    first = rows[0][0]
    last = rows[-1][0]

    steps = [_mean([row[0] for row in each]) for each in bins]
    means = [_mean([row[1] for row in each]) for each in bins]
    lows = [min(row[1] for row in each) for each in bins]
    highs = [max(row[1] for row in each) for each in bins]
    norms = [_mean([row[2] for row in each]) for each in bins]
    low = min(lows)
    high = max(highs)
    top_norm = max(norms)

    def points(values: Sequence[float], bottom: float, top: float) -> list[str]:
        across = [(step - first) / max(1, last - first) * WIDTH for step in steps]
        up = [(value - bottom) / ((top - bottom) or 1) * HEIGHT for value in values]
        return [f"{x:.1f},{HEIGHT - y:.1f}" for x, y in zip(across, up, strict=True)]

    return Curve(
        band=" ".join(points(highs, low, high) + points(lows, low, high)[::-1]),
        loss=" ".join(points(means, low, high)),
        norm=" ".join(points(norms, 0.0, 1.1 * top_norm)),
        last_step=int(last),
        low=low,
        high=high,
        last_norm=rows[-1][2],
    )


def _finite(row: Sequence[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in row)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
