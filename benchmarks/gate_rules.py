"""Rules of the quality gate, and how well each tells failed concepts from good ones.

A rule is a score of the sample pictures that the gate sees; a concept passes at or above a bound. The receiver
operating characteristic over all bounds is summed up by its area, the chance that a good concept scores higher than a
failed one (Hanley and McNeil 1982); the bound at which the rates of false passes and false alarms have the least sum is
that of Youden 1950. Rows of one concept are alike, so the interval of the area is the bootstrap over concepts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from benchmarks.intervals import Row, bootstrap_interval
from benchmarks.timing import table

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """Score that a gate compares with a bound."""

    title: str
    score: Callable[[Scores], float]
    bound: float | None = None
    """Bound that needs no measurement; None where there is no natural one."""


def gain(scores: Scores) -> float:
    return scores["clip_i"] - scores["clip_i_initializer"]


def margin(scores: Scores) -> float:
    return scores["clip_i"] - scores["clip_i_others"]


def above_share(share: float) -> Callable[[Scores], float]:
    """Return a score: CLIP-I less the point that is this share of the way from the initializer word's pictures to the
    photos (`gate.min_clip_i_share`). It needs no division by a way that may be nothing."""

    def score(scores: Scores) -> float:
        word = scores["clip_i_initializer"]
        return scores["clip_i"] - word - share * (scores["clip_i_photos"] - word)

    return score


RULES = (
    Rule("CLIP-I", lambda scores: scores["clip_i"]),
    Rule("gain over the initializer word's pictures (the default)", gain, 0.0),
    Rule("CLIP-I over that of the photos", lambda scores: scores["clip_i"] / scores["clip_i_photos"]),
    Rule("a quarter of the way from the word's pictures to the photos", above_share(0.25), 0.0),
    Rule("half of the way", above_share(0.5), 0.0),
    Rule("three quarters of the way", above_share(0.75), 0.0),
    Rule("margin to the nearest other concept", margin, 0.0),
    Rule("the smaller of gain and margin", lambda scores: min(gain(scores), margin(scores)), 0.0),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """Rates of a rule at one bound."""

    bound: float
    false_passes: float
    """Share of the failed concepts that pass."""
    false_alarms: float
    """Share of the good concepts that do not."""


def area(good: Sequence[float], failed: Sequence[float]) -> float:
    """Return the chance that a good concept scores higher than a failed one, ties counting half; NaN without either."""
    if not good or not failed:
        return math.nan
    wins = sum((one > other) + 0.5 * (one == other) for one in good for other in failed)
    return wins / (len(good) * len(failed))


def rates(good: Sequence[float], failed: Sequence[float], bound: float) -> Bound:
    return Bound(
        bound,
        sum(value >= bound for value in failed) / len(failed),
        sum(value < bound for value in good) / len(good),
    )


def best_bound(good: Sequence[float], failed: Sequence[float]) -> Bound:
    """Return the bound with the least sum of rates, halfway between two scores."""
    values = sorted({*good, *failed})
    between = [values[0], *((low + high) / 2 for low, high in pairwise(values))]
    return min(
        (rates(good, failed, bound) for bound in between), key=lambda each: each.false_passes + each.false_alarms
    )


def has_failed(row: Row, truth: Sequence[str]) -> bool | None:
    """Return whether a row has failed: all of the `truth` scores are below one half. None if they disagree, or one is
    missing."""
    votes = {None if row.get(score) is None else row[score] < 0.5 for score in truth}
    return votes.pop() if len(votes) == 1 else None


def split_scores(rows: Sequence[Row], rule: Rule, truth: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return the rule's scores of good rows and of failed ones."""
    found: dict[bool | None, list[float]] = {False: [], True: [], None: []}
    for row in rows:
        found[has_failed(row, truth)].append(rule.score(row["gate"]))
    return found[False], found[True]


def area_interval(rows: Sequence[Row], rule: Rule, truth: Sequence[str]) -> tuple[float, float]:
    """Return the bootstrap interval of the area over concepts; resamples without good or without failed rows count as
    one half."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["concept_id"], []).append(row)

    def of_sample(sample: Sequence[Sequence[Row]]) -> float:
        value = area(*split_scores(list(chain.from_iterable(sample)), rule, truth))
        return 0.5 if math.isnan(value) else value

    return bootstrap_interval(list(groups.values()), of_sample, repetitions=500)


def show_rules(rows: Sequence[Row], truth: Sequence[str]) -> str:
    """Return a Markdown table of the rules: area, and the rates at the natural bound and at the best one.

    `truth`: scores of other pictures than the gate's, each the share that shows this concept and no other. Rows without
    the gate's scores, or on which the scores disagree, are left out.
    """
    scored = [row for row in rows if row.get("gate")]
    judged = [row for row in scored if has_failed(row, truth) is not None]
    failed = sum(bool(has_failed(row, truth)) for row in judged)
    head = (
        f"{len(judged)} rows, {failed} failed: most of their pictures are nearer to another concept "
        f"({', '.join(truth)}); {len(scored) - len(judged)} undecided rows are left out.\n\n"
    )
    if not failed or failed == len(judged):
        return f"{head}Without both kinds no rule can be measured; take more concepts or seeds, or fewer steps.\n"
    lines: list[list[object]] = []
    for rule in RULES:
        good, bad = split_scores(judged, rule, truth)
        low, high = area_interval(judged, rule, truth)
        best = best_bound(good, bad)
        natural = rates(good, bad, rule.bound) if rule.bound is not None else None
        cells = [f"{each.bound:.3f}: {each.false_passes:.0%}, {each.false_alarms:.0%}" if each else "-"
                 for each in (natural, best)]  # fmt: skip
        lines.append([rule.title, f"{area(good, bad):.3f} ({low:.3f} to {high:.3f})", *cells])
    titles = ["rule", "area (95 % interval)", "natural bound: false passes, false alarms", "best bound: the same"]
    return head + table(titles, lines)
