"""The counts of a run, and what the last lines and the report say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED, LATE, OK, STOPPED
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.plan import Plan
from pipeline.ledger.records import ConceptRecord
from pipeline.report.page import build_report
from pipeline.report.run_stats import DeviceTime, RunStats
from pipeline.report.run_summary import conclude, figures_of
from pipeline.report_config import ReportConfig
from pipeline.store.storage import RunStore


def test_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = RunConfig(output=str(tmp_path)), Plan("settings", set())
    assert conclude(config, RunStats(rows=2, learned=2), plan) == OK
    capsys.readouterr()

    stats = RunStats(rows=30, learned=5, failures={f"c{i}": "no photo" for i in range(25)})
    plan.bad.append(BadRow(file="m.parquet", row=7, concept_id=None, reason="no concept_id"))
    stats.problems["drawing"] = "stopped"
    assert conclude(config, stats, plan) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 learned, 0 done before, 25 failed, 1 bad rows in 0:0")
    assert lines[1] == f"report: {RunStore(str(tmp_path)).uri('report.html')}"
    assert lines[2:4] == ["FAILED drawing: stopped", "FAILED c0: no photo"]
    assert lines[-1] == "FAILED 7 more, all in results.parquet"

    stats.is_late, plan.num_todo = True, 32
    assert conclude(config, stats, plan) == LATE
    assert "ended at --finish-by with 2 not learned" in capsys.readouterr().out
    stats.is_stopped = True
    assert conclude(config, stats, plan) == STOPPED


def test_what_a_run_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ReportConfig(hour_price=2.5, currency="EUR")
    config, plan = RunConfig(output=str(tmp_path), report=report), Plan("settings", set())
    stats = RunStats(rows=1, on_gpus=True)
    hours = DeviceTime(stats, devices_per_actor=0.5)
    for seconds, ready in ((3600.0, 4), (7200.0, 8)):  # half a GPU each
        hours.observe({"seconds": seconds, "ready": ready, "starting": 0})
    conclude(config, stats, plan)
    assert "device time: 6.00 GPU-hours, 15.00 EUR\n" in capsys.readouterr().out
    assert figures_of(config, stats, plan).cost == "15.00 EUR"
    assert stats.cost(ReportConfig()) == ""


def test_calls_lost_and_tries_are_counted(tmp_path: Path) -> None:
    stats, plan = RunStats(rows=3), Plan("settings", set())
    for name, attempts, status in (("a", 1, "done"), ("b", 3, "done"), ("c", 3, "failed")):
        stats.settle(
            ConceptRecord(
                concept_id=name, fingerprint="f", status=status, placeholder_token="<x>", attempts=attempts, steps=5
            )
        )
    stats.gate_retries.passed = 1
    figures = figures_of(RunConfig(output=str(tmp_path)), stats, plan)
    assert (figures.learned, figures.retried, figures.facts["steps"]) == (2, 3, "10")
    assert figures.facts["below the gate, tried again"] == "1 (1 passed then)"


def test_the_page_tells_of_a_stage_that_was_given_up(tmp_path: Path) -> None:
    stats = RunStats(rows=1)
    stats.problems["learning"] = "given up: no actor starts"
    config = RunConfig(output=str(tmp_path))
    build_report(RunStore(config.output), config, figures_of(config, stats, Plan("settings", set())))
    assert "given up: no actor starts" in (tmp_path / "report.html").read_text()
