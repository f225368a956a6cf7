"""Make the tables of a comparison's rows."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.intervals import Row, against, by_setup, over_concepts, show_paired, signed
from benchmarks.scores import score_names
from benchmarks.timing import table
from pipeline.report.intervals import Interval

BASELINE = "textual-inversion"
"""Setup that the others are compared with, unless a command names another."""


def show_scores(rows: Sequence[Row], baseline: str, what: Mapping[str, str]) -> str:
    """Return Markdown: what the figures are, all scores and their differences to the baseline, and the learning."""
    concepts = len({row["concept_id"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    head = (
        f"{concepts} concepts, seeds {', '.join(map(str, seeds))}. Means over concepts, each first averaged over its "
        "seeds; ± is half the width of the 95 % interval (Student's t over concepts).\n\n"
    )
    return head + show_paired(rows, score_names(rows), baseline, what) + "\n" + show_learning(rows)


def show_learning(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the setups that learn: row norms, steps taken, the step whose rows were kept, concepts
    that ended before their budget, seconds of learning."""
    norms = over_concepts(rows, "norm")
    lines: list[list[object]] = []
    for name, of_setup in by_setup(rows).items():
        if any(row["steps"] for row in of_setup):
            early = sum(row["steps"] < row["budget"] for row in of_setup)
            seconds = fmean(row["seconds"] for row in of_setup)
            steps = [spread(row[key] for row in of_setup) for key in ("steps", "kept_at")]
            lines.append([name, norms[name], *steps, early, f"{seconds:.0f}"])
    return table(["setup", "row norm", "steps taken", "kept at", "stopped early", "s per concept"], lines)


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
        others = {(row["concept_id"], row["seed"]): row for row in setups.get(whole, ())}
        keys = [(row, (row["concept_id"], row["seed"])) for row in setups.get(name, ())]
        pairs = [(row, others[key]) for row, key in keys if key in others]
        if pairs:
            texts.append(f"## {name} against {whole}, which takes all steps\n\n{_show_pair(pairs)}")
    if texts:
        texts.append(
            "A difference is taken picture by picture, as both draw from the same noise; its interval is over a "
            "concept's pictures, in the\nlast row over concepts. Seconds are of learning alone, evaluation steps "
            "included.\n"
        )
    return "\n".join(texts)


def _show_pair(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Return a table of pairs (ended by the rule, at the full budget): a row per concept and seed, and one for all."""
    titles = ["concept", "steps taken", "of", "kept at"]
    titles += [title for score in ("CLIP-I", "CLIP-T") for title in (score, "at the full budget", "difference")]
    lines: list[list[object]] = []
    for row, other in pairs:
        cells = [row["concept_id"], *(f"{row[key]:.0f}" for key in ("steps", "budget", "kept_at"))]
        for score in ("clip_i", "clip_t"):
            both = zip(row[f"{score}_pictures"], other[f"{score}_pictures"], strict=True)
            cells += [_three(one[score]) for one in (row, other)]
            cells.append(signed(Interval.of(here - there for here, there in both)))
        lines.append([*cells, *(f"{one['seconds']:.0f}" for one in (row, other))])
    ours = [row for row, _ in pairs]
    theirs = [other for _, other in pairs]
    cells = [f"all {len(pairs)}", *(spread(row[key] for row in ours) for key in ("steps", "budget", "kept_at"))]
    for score in ("clip_i", "clip_t"):
        cells += [str(over_concepts(side, score)[side[0]["setup"]] or "-") for side in (ours, theirs)]
        cells.append(signed(against([*ours, *theirs], score, theirs[0]["setup"])[ours[0]["setup"]]))
    lines.append([*cells, *(f"{fmean(row['seconds'] for row in side):.0f}" for side in (ours, theirs))])
    return table([*titles, "s", "at the full budget"], lines)


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def rows_parquet(rows: Sequence[Row]) -> bytes:
    """Return the rows as a Parquet file, with a column for every score that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), buffer)
    return buffer.getvalue()
