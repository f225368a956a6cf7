"""Make a table of a comparison's rows, and the distortion-editability plot of Gal et al. 2022 (Fig. 10)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Sheet

REFERENCES = ("image-only", "prompt-only", "initializer", "human-captions")
"""Setups that learn nothing; the plot shows them with another mark."""

BASELINE = "textual-inversion"
"""Setup that the others are compared with, concept by concept."""

_TITLES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "psnr_db": "PSNR, dB", "edge_ratio": "edges, of the photo's"}
"""Title of each score in the table."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """Mean over concepts and its standard error, which is None for a single concept."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) / len(known) ** 0.5 if len(known) > 1 else None)

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """Format the figure; with the format `+`, numbers that are not negative get a plus sign."""
        return f"{self.mean:{sign}.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


def by_setup(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["setup"], []).append(row)
    return found


def against(rows: Sequence[Row], score: str, baseline: str = BASELINE) -> dict[str, Figure | None]:
    """Return setup -> mean over concepts of its score minus the baseline's score of the same concept.

    Concepts differ more from each other than setups do, and all setups draw from the same noise, so the error of these
    differences tells two setups apart where the errors of the scores do not.
    """
    scores = {(row["setup"], row["concept_id"]): row[score] for row in rows}
    base = {concept: value for (setup, concept), value in scores.items() if setup == baseline}
    return {
        name: Figure.of(
            scores[name, row["concept_id"]] - base[row["concept_id"]]
            for row in of_setup
            if row[score] is not None and base.get(row["concept_id"]) is not None
        )
        for name, of_setup in by_setup(rows).items()
    }


def table(rows: Sequence[Row], what: Mapping[str, str]) -> str:
    """Return a Markdown table of the setups: mean and standard error over concepts of each score and of its difference
    to the baseline; steps taken, the step whose rows were kept, concepts that ended before their budget, seconds."""
    further = {score: against(rows, score) for score in _TITLES}
    titles = ["setup", *(title for score in _TITLES.values() for title in (score, "more than the default")), "row norm"]
    titles += ["steps taken", "kept at", "stopped early", "s per concept", "concepts", ""]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, of_setup in by_setup(rows).items():
        cells = []
        for score in _TITLES:
            cells.append(str(Figure.of(row[score] for row in of_setup) or "-"))
            more = further[score][name] if name != BASELINE else None
            cells.append(f"{more:+}" if more else "-")
        cells.append(str(Figure.of(row["norm"] for row in of_setup) or "-"))
        if any(row["steps"] for row in of_setup):
            cells += [spread(row["steps"] for row in of_setup), spread(row["kept_at"] for row in of_setup)]
            cells += [str(sum(row["steps"] < row["budget"] for row in of_setup))]
            cells += [f"{fmean(row['seconds'] for row in of_setup):.0f}"]
        else:
            cells += ["-"] * 4
        lines.append(f"| {name} | {' | '.join(cells)} | {len(of_setup)} | {what.get(name, '')} |")
    return "\n".join(lines) + "\n"


def spread(values: Iterable[float]) -> str:
    """Return the mean, lowest and highest value as text."""
    known = list(values)
    low = min(known)
    high = max(known)
    return f"{fmean(known):.0f}" + (f" ({low:.0f} to {high:.0f})" if high > low else "")


def stopping(rows: Sequence[Row], full_budget: Mapping[str, str]) -> str:
    """Return Markdown tables of what each stop rule saves and costs, concept by concept.

    `full_budget`: setup -> the same setup without its stop rule; a pair with one side missing has no table.
    """
    setups = by_setup(rows)
    texts = []
    for name, whole in full_budget.items():
        others = {row["concept_id"]: row for row in setups.get(whole, ())}
        pairs = [(row, others[row["concept_id"]]) for row in setups.get(name, ()) if row["concept_id"] in others]
        if pairs:
            texts.append(f"## {name} against {whole}, which takes all steps\n\n{_of_pair(pairs)}")
    if texts:
        texts.append(
            "A difference is taken picture by picture, as both draw from the same noise; its error is over a concept's "
            "pictures, in the\nlast row over concepts. Seconds are of learning alone, evaluation steps "
            "included.\n"
        )
    return "\n".join(texts)


def _of_pair(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Return a table of pairs (ended by the rule, at the full budget): a row per concept, and one for all."""
    titles = ["concept", "steps taken", "of", "kept at"]
    titles += [title for score in ("CLIP-I", "CLIP-T") for title in (score, "at the full budget", "difference")]
    lines = [f"| {' | '.join([*titles, 's', 'at the full budget'])} |", "|---" * 12 + "|"]
    for row, other in pairs:
        cells = [row["concept_id"], *(f"{row[key]:.0f}" for key in ("steps", "budget", "kept_at"))]
        for score in ("clip_i", "clip_t"):
            both = zip(row[f"{score}_pictures"], other[f"{score}_pictures"], strict=True)
            cells += [_three(one[score]) for one in (row, other)]
            cells.append(_signed(Figure.of(here - there for here, there in both)))
        cells += [f"{one['seconds']:.0f}" for one in (row, other)]
        lines.append(f"| {' | '.join(cells)} |")
    ours = [row for row, _ in pairs]
    theirs = [other for _, other in pairs]
    cells = [f"all {len(pairs)}", *(spread(row[key] for row in ours) for key in ("steps", "budget", "kept_at"))]
    for score in ("clip_i", "clip_t"):
        cells += [str(Figure.of(row[score] for row in side) or "-") for side in (ours, theirs)]
        cells.append(_signed(against([*ours, *theirs], score, theirs[0]["setup"])[ours[0]["setup"]]))
    cells += [f"{fmean(row['seconds'] for row in side):.0f}" for side in (ours, theirs)]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"]) + "\n"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(figure: Figure | None) -> str:
    return f"{figure:+}" if figure else "-"


def rows_parquet(rows: Sequence[Row]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Point:
    """Setup on the plot."""

    name: str
    across: Figure
    up: Figure

    @property
    def is_reference(self) -> bool:
        return self.name in REFERENCES


def plot(rows: Sequence[Row]) -> bytes:
    """Draw a PNG with CLIP-T across and CLIP-I up, and a labelled point with error bars for each setup; where many
    points lie close together, a second panel shows that part larger."""
    points = []
    for name, of_setup in by_setup(rows).items():
        across, up = (Figure.of(row[score] for row in of_setup) for score in ("clip_t", "clip_i"))
        if across and up:
            points.append(Point(name, across, up))
    crowd = _crowd([point for point in points if not point.is_reference])
    sheet = Sheet(figsize=(15, 7.5) if crowd else (9, 7), dpi=110, layout="tight")
    canvas = FigureCanvasAgg(sheet)
    panels = sheet.subplots(1, 2 if crowd else 1, squeeze=False)[0]
    for axes in panels:
        _draw(axes, points)
    count = len({row["concept_id"] for row in rows})
    panels[0].set_title(f"Mean and standard error over {count} concept{'s' * (count > 1)}", fontsize=10)
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


def _range(figures: Iterable[Figure]) -> tuple[float, float]:
    """Return the range of the means, with room for labels."""
    means = [figure.mean for figure in figures]
    room = 0.15 * (max(means) - min(means)) + 1e-3
    return min(means) - room, max(means) + room


def _draw(axes: Any, points: Sequence[Point]) -> None:
    for point in points:
        axes.errorbar(
            point.across.mean,
            point.up.mean,
            xerr=point.across.error,
            yerr=point.up.error,
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
