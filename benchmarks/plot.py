"""Draw the distortion-editability plot of Gal et al. 2022 (Fig. 10) from a comparison's rows."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Sheet

from benchmarks.intervals import Row, by_setup, over_concepts
from pipeline.report.intervals import Interval

REFERENCES = ("image-only", "prompt-only", "initializer", "short-captions", "long-captions")
"""Setups that learn nothing; the plot shows them with another mark."""


@dataclass(frozen=True, slots=True)
class Point:
    """Setup on the plot."""

    name: str
    across: Interval
    up: Interval

    @property
    def is_reference(self) -> bool:
        return self.name in REFERENCES


def plot(rows: Sequence[Row]) -> bytes:
    """Draw a PNG with CLIP-T across and CLIP-I up, and a labelled point with error bars for each setup; where many
    points lie close together, a second panel shows that part larger."""
    points = []
    across, up = (over_concepts(rows, score) for score in ("clip_t", "clip_i"))
    for name in by_setup(rows):
        if (right := across[name]) and (high := up[name]):
            points.append(Point(name, right, high))
    crowd = _crowd([point for point in points if not point.is_reference])
    sheet = Sheet(figsize=(15, 7.5) if crowd else (9, 7), dpi=110, layout="tight")
    canvas = FigureCanvasAgg(sheet)
    panels = sheet.subplots(1, 2 if crowd else 1, squeeze=False)[0]
    for axes in panels:
        _draw(axes, points)
    count = len({row["concept_id"] for row in rows})
    panels[0].set_title(f"Mean and 95 % interval over {count} concept{'s' * (count > 1)}", fontsize=10)
    if crowd:
        panels[1].set_title("The learned setups, larger", fontsize=10)
        panels[1].set(xlim=_range(point.across for point in crowd), ylim=_range(point.up for point in crowd))
    canvas.draw()  # the axes get their final positions here
    sheet.set_layout_engine("none")
    outside = [point for point in points if point not in crowd]
    labelled = [outside, points] if crowd else [points]
    for axes, names in zip(panels, labelled, strict=True):
        _label(axes, names, points, canvas.get_renderer())
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png")
    return buffer.getvalue()


def _crowd(points: Sequence[Point], at_least: int = 8) -> list[Point]:
    """Return the points within three interquartile ranges of both medians; none if there are few points."""
    if len(points) < at_least:
        return []
    near = points
    for values in ([point.across.mean for point in points], [point.up.mean for point in points]):
        low, middle, high = quantiles(values, n=4)
        allowed = {p.name for p, value in zip(points, values, strict=True) if abs(value - middle) <= 3 * (high - low)}
        near = [point for point in near if point.name in allowed]
    return list(near)


def _range(figures: Iterable[Interval]) -> tuple[float, float]:
    """Return the range of the means, with room for labels."""
    means = [figure.mean for figure in figures]
    room = 0.15 * (max(means) - min(means)) + 1e-3
    return min(means) - room, max(means) + room


def _draw(axes: Any, points: Sequence[Point]) -> None:
    for point in points:
        axes.errorbar(
            point.across.mean,
            point.up.mean,
            xerr=point.across.half_width,
            yerr=point.up.half_width,
            markersize=6,
            fmt="s" if point.is_reference else "o",
            color="0.45" if point.is_reference else "C0",
            elinewidth=0.7,
            ecolor="0.75",
            capsize=0,
            zorder=2,
        )
    axes.set_xlabel("CLIP-T (editability): follows the prompt")
    axes.set_ylabel("CLIP-I (reconstruction): looks like the photos")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.margins(0.08)


def _label(axes: Any, labelled: Sequence[Point], points: Sequence[Point], renderer: Any) -> None:
    """Write each name near its point where it covers no other name or point; connect distant names by a line."""
    frame = axes.get_window_extent(renderer)
    scale = axes.figure.dpi / 72
    dots = {point.name: axes.transData.transform((point.across.mean, point.up.mean)) for point in points}
    taken = [_box(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in dots.values()]
    for point in sorted(labelled, key=lambda point: -point.up.mean):
        x, y = dots[point.name]
        if not (frame.x0 <= x <= frame.x1 and frame.y0 <= y <= frame.y1):
            continue
        at = (point.across.mean, point.up.mean)
        text = axes.annotate(
            point.name,
            at,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3},
        )
        size = text.get_window_extent(renderer)
        place = _place(x, y, size.width, size.height, scale, taken, frame)
        left, bottom, distance = place
        taken.append(_box(left, bottom, left + size.width, bottom + size.height))
        text.set_position(((left - x) / scale, (bottom - y) / scale))
        if distance > 12:
            axes.annotate(
                "",
                at,
                xytext=(left + size.width / 2, bottom + size.height / 2),
                textcoords="figure pixels",
                zorder=1,
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
            )


Box = tuple[float, float, float, float]


def _box(left: float, bottom: float, right: float, top: float) -> Box:
    return left, bottom, right, top


def _place(
    x: float, y: float, width: float, height: float, scale: float, taken: Sequence[Box], frame: Any
) -> tuple[float, float, float]:
    """Return (left, bottom, distance in points) of the nearest free place around a point, or of the nearest place."""
    for distance in (8, 14, 22, 32, 44, 58, 74, 92, 112):
        reach = distance * scale
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)):
            left = x + dx * reach + (0 if dx > 0.1 else -width if dx < -0.1 else -width / 2)
            bottom = y + dy * reach - height / 2
            box = _box(left - 2, bottom - 2, left + width + 2, bottom + height + 2)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                return left, bottom, distance
    return x + 8 * scale, y - height / 2, 8


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
