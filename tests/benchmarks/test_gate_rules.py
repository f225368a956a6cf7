"""Rules of the gate against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gate_rules import (
    RULES,
    Bound,
    above_share,
    area,
    best_bound,
    has_failed,
    margin,
    rates,
    show_rules,
)


def row(concept: str, own: float, clip_i: float, others: float) -> dict[str, Any]:
    gate = {"clip_i": clip_i, "clip_i_initializer": 0.1, "clip_i_photos": 0.9, "clip_i_others": others}
    return {"setup": "fast", "concept_id": concept, "seed": 0, "clip_own": own, "gate": gate}


ROWS = [row("a", 1.0, 0.8, 0.2), row("b", 0.5, 0.6, 0.3), row("c", 0.25, 0.3, 0.4), row("d", 0.0, 0.05, 0.2)]


def test_the_area_is_the_chance_that_a_good_one_scores_higher() -> None:
    assert area([0.9, 0.4], [0.5, 0.1]) == 0.75
    assert area([1.0], [1.0]) == 0.5
    assert area([], [1.0]) != area([], [1.0])


def test_rates_at_a_bound_and_the_best_bound() -> None:
    assert rates([0.9, 0.4], [0.5, 0.1], 0.45) == Bound(0.45, 0.5, 0.5)
    best = best_bound([0.9, 0.8], [0.5, 0.1])
    assert (best.bound, best.false_passes, best.false_alarms) == (pytest.approx(0.65), 0, 0)


def test_scores_of_rules() -> None:
    gate = ROWS[1]["gate"]
    assert (margin(gate), above_share(0.5)(gate)) == (pytest.approx(0.3), pytest.approx(0.1))
    assert [rule.score(gate) for rule in RULES] == pytest.approx([0.6, 0.5, 0.6 / 0.9, 0.3, 0.1, -0.1, 0.3, 0.3])


def test_the_table_shows_what_passes_falsely() -> None:
    said = show_rules(ROWS, ["clip_own"])
    assert said.startswith("4 rows, 2 failed")
    lines = {line.split(" | ")[0].strip("| "): line for line in said.splitlines() if line.startswith("|")}
    assert "0.000: 50%, 0%" in lines["gain over the initializer word's pictures (the default)"]  # c passes, d does not
    assert "0.000: 0%, 0%" in lines["margin to the nearest other concept"]
    assert "no rule can be measured" in show_rules(ROWS[:2], ["clip_own"])


def test_judges_that_disagree_decide_nothing() -> None:
    rows = [{**row, "moco_own": row["clip_own"]} for row in ROWS]
    assert [has_failed({"a": a, "b": b}, ["a", "b"]) for a, b in ((0.4, 0.0), (0.5, 1.0), (0.4, 0.5))] == [
        True,
        False,
        None,
    ]
    assert has_failed({"a": 0.4}, ["a", "b"]) is None
    both = ["clip_own", "moco_own"]
    assert show_rules(rows, both).splitlines()[2:] == show_rules(ROWS, ["clip_own"]).splitlines()[2:]
    odd = {**rows[0], "moco_own": 1 - rows[0]["moco_own"]}
    assert "; 1 undecided rows are left out" in show_rules([odd, *rows[1:]], both)
