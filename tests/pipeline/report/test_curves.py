from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.report.curves import HEIGHT, WIDTH, read_curve


def parquet(steps: list[int], losses: list[float | None], norms: list[float]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"norm": norms, "loss": losses, "step": steps}), buffer)
    return buffer.getvalue()


def points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in text.split())]


def test_a_falling_loss_falls_from_corner_to_corner() -> None:
    curve = read_curve(parquet([1, 2, 3], [3.0, 2.0, 1.0], [0.1, 0.2, 0.4]))
    assert curve is not None
    assert points(curve.loss) == [(0, 0), (WIDTH / 2, HEIGHT / 2), (WIDTH, HEIGHT)]
    assert (curve.low, curve.high, curve.last_step, curve.last_norm) == (1.0, 3.0, 3, 0.4)


def test_a_long_curve_is_thinned_and_its_band_holds_every_value() -> None:
    losses = np.random.default_rng(0).exponential(1.0, 5000)
    curve = read_curve(parquet(list(range(1, 5001)), list(losses), [0.4] * 5000))
    assert curve is not None
    assert len(points(curve.loss)) <= 60
    assert len(points(curve.band)) == 2 * len(points(curve.loss))
    assert (curve.low, curve.high) == (losses.min(), losses.max())
    for text in (curve.loss, curve.band, curve.norm):
        assert all(0 <= x <= WIDTH and -0.05 <= y <= HEIGHT + 0.05 for x, y in points(text))


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan, math.inf, None, 1.0]])
def test_too_few_finite_points_draw_nothing(losses: list[float | None]) -> None:
    assert read_curve(parquet(list(range(len(losses))), losses, [0.4] * len(losses))) is None


def test_flat_lines_are_drawn() -> None:
    curve = read_curve(parquet([5, 5], [1.0, 1.0], [0.0, 0.0]))
    assert curve is not None
    assert "nan" not in curve.loss + curve.norm
