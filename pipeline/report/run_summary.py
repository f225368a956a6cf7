"""The summary of a run: `run.json`, the report's figures and the command's last lines."""

from __future__ import annotations

import importlib.metadata
import json
import time
from functools import partial
from typing import Any

from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.inputs.manifest import BadRow
from pipeline.inputs.models import demo_note
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import Plan
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.report.estimate import Rate, as_json, rate_of
from pipeline.report.logs import say
from pipeline.report.outcome import outcome_of
from pipeline.report.page import RunFigures
from pipeline.report.run_stats import RunStats
from pipeline.store.redact import redact, redacted
from pipeline.store.storage import RunStore
from pipeline.times import format_clock, now

SHOWN_FAILURES = 20
"""Failures that a command prints; it counts the others."""

_GATE_COUNTS = ("tried", "passed", "better", "below", "learned_before", "waiting")


def figures_of(config: RunConfig, stats: RunStats, plan: Plan, selection: Selection = ALL_CONCEPTS) -> RunFigures:
    """Return the figures that the report shows of a run."""
    gate_retries = stats.gate_retries
    facts = {
        "caution": demo_note(config),
        "left for another run": f"{plan.num_left_out:,} concepts ({selection.options})" if plan.num_left_out else "",
        "below the gate, tried again": gate_retries.describe(),
        "calls lost and made again": f"for {stats.retried:,} concepts" if stats.retried else "",
        "storage calls made again": f"{stats.calls_repeated:,}" if stats.calls_repeated else "",
        "steps": f"{stats.steps + gate_retries.steps:,}" if stats.steps else "",
        "pictures": stats.pictures,
        "ended early": "--finish-by" if stats.is_late else "",
    }
    return RunFigures(
        learned=stats.learned,
        skipped=plan.num_done,
        pending=max(0, plan.num_todo - stats.num_settled),
        retried=stats.retried + gate_retries.ended,
        cost=stats.cost(config.report),
        device_time=stats.device_time(),
        device_seconds=stats.device_seconds,
        seconds=time.monotonic() - stats.began,
        problems=stats.problems,
        facts={name: text for name, text in facts.items() if text} | versions(),
    )


def describe_left_out(plan: Plan, selection: Selection) -> str:
    """Return the number of rows that the selection left out, for a line of counts; empty if there are none."""
    return f"{plan.num_left_out} left out by {selection.options}, " if plan.num_left_out else ""


def conclude(config: RunConfig, stats: RunStats, plan: Plan, selection: Selection = ALL_CONCEPTS) -> int:
    """Print the last lines: the counts, the report's address and the failures; return the exit code."""
    write = partial(say, config.log_format)
    bad = [row for row in plan.bad if selection.includes(row.concept_id)]
    write(
        f"{stats.learned} learned, {plan.num_done} done before, {describe_left_out(plan, selection)}"
        f"{len(stats.failures)} failed, {len(bad)} bad rows in {format_clock(time.monotonic() - stats.began)}\n"
    )
    spent = ", ".join(text for text in (stats.device_time(), stats.cost(config.report)) if text)
    lines = {
        "below the gate, tried again": stats.gate_retries.describe(),
        "pictures": stats.pictures,
        "device time": spent,
    }
    for name, text in lines.items():
        if text:
            write(f"{name}: {text}\n")
    if stats.is_stopped:
        write("stopped before the end; run the same command again to continue\n")
    else:
        write(redact(f"report: {RunStore(config.output).uri('report.html')}\n"))
    if stats.is_late and not stats.is_stopped:
        unlearned = plan.num_todo - stats.num_settled
        write(f"ended at --finish-by with {unlearned} not learned; run the same command again to continue\n")
    failures = [f"{name}: {error}" for name, error in (*stats.problems.items(), *stats.failures.items())]
    failures += [f"{name}: {redact(plan.damaged[name])}" for name in sorted(plan.damaged_left_out)]
    failures += [f"bad row: {describe_bad_row(row)}" for row in bad]
    for failure in failures[:SHOWN_FAILURES]:
        write(f"FAILED {failure}\n")
    if len(failures) > SHOWN_FAILURES:
        write(f"FAILED {len(failures) - SHOWN_FAILURES} more, all in results.parquet\n")
    outcome = outcome_of(config, stats, plan, selection)
    if line := outcome.describe(config):
        write(f"{line}\n")
    return outcome.exit_code


def describe_bad_row(row: BadRow) -> str:
    """Return a bad row's place and reason in one line."""
    return f"{place_of(row)}: {row.reason}"


def place_of(row: BadRow) -> str:
    """Return a bad row's file, number and concept id."""
    return f"{row.file}, row {row.row}{f' ({row.concept_id})' if row.concept_id else ''}"


def describe_run(
    config: RunConfig, stats: RunStats, plan: Plan, settings: dict[str, Any], rate_before: Rate | None = None
) -> bytes:
    """Return `run.json`: the configuration, the versions, the stage, the counts so far, and the rate of learning, which
    is `rate_before` until a concept is learned."""
    gate_retries = stats.gate_retries
    counts = {
        "rows": stats.rows,
        "done_before": plan.num_done,
        "learned": stats.learned,
        "failed": len(stats.failures),
        "retried": stats.retried,
        "storage_calls_repeated": stats.calls_repeated,
        "problems": stats.problems,
        "bad_rows": len(plan.bad),
        "left_out": plan.num_left_out,
        "looked_at": plan.num_done + plan.num_todo + plan.num_left_out + len(plan.bad),
        "steps": stats.steps + gate_retries.steps,
        "gate": {name: getattr(gate_retries, name) for name in _GATE_COUNTS},
    }
    description = {
        "stage": stats.stage,
        "exit_code": stats.exit_code,
        "meaning": stats.meaning,
        "started_at": stats.started_at,
        "written_at": now(),
        "config": redacted(shown_tree(config)),
        "model_hash": settings["model"],
        "settings": digest(settings),
        "versions": versions(),
        "counts": counts,
        "progress": {name: round(value, 1) for name, value in stats.progress.items()},
        "rate": as_json(rate_of(stats, digest(settings)) or rate_before),
        "seconds": round(time.monotonic() - stats.began, 1),
        "device_hours": {"of": "gpu" if stats.on_gpus else "core", "hours": round(stats.device_hours, 4)},
    }
    return json.dumps(description, indent=1).encode()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results may depend on, by name."""
    names = ("torch", "diffusers", "transformers", "ray")
    return {name: importlib.metadata.version(name) for name in names}
