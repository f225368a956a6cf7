"""Compute means over concepts and paired differences between setups, with 95 % confidence intervals.

A setup's scores are first averaged over the seeds of a concept, so that one concept is one value however often it was
learned. The interval is Student's t interval over concepts (`pipeline/report/intervals.py`). Over the 10 to 50 concepts
of a comparison it keeps its coverage better than the percentile bootstrap, which is too narrow for so few values
(Hesterberg 2015, "What Teachers Should Know About the Bootstrap", sections 3 and 4). Statistics that are no means, such
as an entropy, have the percentile bootstrap of `bootstrap_interval` (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.timing import table
from pipeline.report.intervals import LEVEL, Interval

Row = Mapping[str, Any]
"""Scores of one concept in one setup and seed: `setup`, `concept_id`, `seed` and a column for every score."""


def signed(interval: Interval | None) -> str:
    """Return an interval with its sign as the cell of a table; `-` where there is none."""
    return f"{interval:+}" if interval else "-"


def by_setup(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["setup"], []).append(row)
    return found


def score_by_concept(rows: Sequence[Row], score: str) -> dict[tuple[str, str], float]:
    """Return (setup, concept) -> the mean of a score over seeds; concepts without the score are left out."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get(score) is not None:
            values.setdefault((row["setup"], row["concept_id"]), []).append(row[score])
    return {key: fmean(of_seeds) for key, of_seeds in values.items()}


def over_concepts(rows: Sequence[Row], score: str) -> dict[str, Interval | None]:
    """Return setup -> the mean over concepts of a score."""
    means = score_by_concept(rows, score)
    return {name: Interval.of(value for (setup, _), value in means.items() if setup == name) for name in by_setup(rows)}


def against(rows: Sequence[Row], score: str, baseline: str) -> dict[str, Interval | None]:
    """Return setup -> mean over concepts of its score minus the baseline's score of the same concept.

    Concepts differ more from each other than setups do, and all setups draw from the same noise, so these differences
    tell two setups apart where the scores do not.
    """
    means = score_by_concept(rows, score)
    base = {concept: value for (setup, concept), value in means.items() if setup == baseline}
    return {
        name: Interval.of(
            value - base[concept] for (setup, concept), value in means.items() if setup == name and concept in base
        )
        for name in by_setup(rows)
    }


def spread_over_seeds(rows: Sequence[Row], score: str) -> dict[str, Interval | None]:
    """Return setup -> mean over concepts of the standard deviation of a score over a concept's seeds."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get(score) is not None:
            values.setdefault((row["setup"], row["concept_id"]), []).append(row[score])
    return {
        name: Interval.of(stdev(v) for (setup, _), v in values.items() if setup == name and len(v) > 1)
        for name in by_setup(rows)
    }


def bootstrap_interval(
    values: Sequence[Any], statistic: Callable[[Sequence[Any]], float], *, repetitions: int = 2000
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of a statistic of independent values, (low, high).

    The resamples come from a fixed seed. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values to resample")
    generator = np.random.default_rng(0)
    found = [
        statistic([values[i] for i in generator.integers(len(values), size=len(values))]) for _ in range(repetitions)
    ]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def show_paired(
    rows: Sequence[Row], scores: Mapping[str, str], baseline: str, what: Mapping[str, str] | None = None
) -> str:
    """Return two Markdown tables of the setups: each score's mean over concepts, and its difference to the baseline.

    `scores`: column -> its title. `what`: setup -> its description, a last column of the first table.
    """
    setups = by_setup(rows)
    counts = {name: len({row["concept_id"] for row in of_setup}) for name, of_setup in setups.items()}
    means = {score: over_concepts(rows, score) for score in scores}
    differences = {score: against(rows, score, baseline) for score in scores}
    absolute = [
        [name, *(means[score][name] for score in scores), counts[name], *([what.get(name, "")] if what else [])]
        for name in setups
    ]
    text = table(["setup", *scores.values(), "concepts", *([""] if what else [])], absolute)
    relative = [
        [f"{name} less {baseline}", *(signed(differences[score][name]) for score in scores)]
        for name in setups
        if name != baseline
    ]
    if baseline in setups and relative:
        text += "\n" + table(["difference, concept by concept", *scores.values()], relative)
    return text
