"""Tests of the failures that count at a run's end."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED, LATE, OK, TOLERATED
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.known_failures import key_of
from pipeline.ledger.plan import Plan
from pipeline.report.outcome import outcome_of
from pipeline.report.run_stats import RunStats
from pipeline.report_config import ToleranceConfig

ROWS = [BadRow(file="m", row=i, concept_id=f"c{i}", reason="no photo", content=f"{i}") for i in range(4)]


def planned(*bad: BadRow) -> Plan:
    plan = Plan("settings", set())
    plan.bad.extend(bad)
    return plan


@pytest.mark.parametrize(
    ("failures", "num_bad", "known", "code"),
    [
        ("", 1, [], FAILED),
        ("", 1, ROWS, FAILED),
        ("", 0, [], OK),
        ("1%", 0, [], OK),
        ("1%", 2, [], TOLERATED),  # of 200 rows
        ("1%", 3, [], FAILED),
        ("1.5%", 3, [], TOLERATED),
        (3, 3, [], TOLERATED),
        (0, 3, ROWS, TOLERATED),
        ("0", 4, ROWS[:3], FAILED),
    ],
)
def test_new_failures_count(failures: int | str, num_bad: int, known: list[BadRow], code: int) -> None:
    config = RunConfig(tolerance=ToleranceConfig(failures=failures))
    stats = RunStats(rows=200, known_before=frozenset(map(key_of, known)))
    outcome = outcome_of(config, stats, planned(*ROWS[:num_bad]))
    assert outcome.exit_code == code
    assert ("WARNING" in outcome.describe(config)) == (code == TOLERATED)


def test_only_rows_and_concepts_are_tolerated() -> None:
    config = RunConfig(tolerance=ToleranceConfig(failures="50%", exit_code=0))
    stats = RunStats(rows=10, failures={"a": "worker lost"})
    outcome = outcome_of(config, stats, planned(ROWS[0]))
    assert (outcome.num_new, outcome.limit, outcome.exit_code, outcome.is_tolerated) == (2, 5, OK, True)
    assert outcome_of(config, dataclasses.replace(stats, problems={"drawing": "x"}), planned()).exit_code == FAILED
    assert outcome_of(config, dataclasses.replace(stats, is_late=True), planned()).exit_code == LATE


@pytest.mark.parametrize("failures", ["1 percent", "101%", -1, "-1", True])
def test_tolerance_is_a_share_or_a_count(failures: int | str) -> None:
    with pytest.raises(ValueError, match=r"tolerance\.failures"):
        ToleranceConfig(failures=failures)
