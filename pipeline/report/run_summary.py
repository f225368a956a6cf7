"""What became of a run: counted while it goes, then `run.json`, the report's figures and the last lines."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.config import ReportConfig, RunConfig
from pipeline.config_file import to_tree
from pipeline.exit_codes import FAILED, LATE, OK, STOPPED
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import EVERY, Plan, Selection
from pipeline.ledger.records import ConceptRecord
from pipeline.report.logs import say
from pipeline.report.page import RunFigures
from pipeline.report.progress import Facts
from pipeline.store import retries
from pipeline.store.redact import redact, redacted
from pipeline.store.storage import RunStore
from pipeline.times import format_seconds, now

SHOWN_FAILURES = 20
"""Failures that a command prints; it counts the others."""

_GATE_COUNTS = ("tried", "passed", "better", "below", "learned_before", "waiting")


@dataclass(slots=True)
class RetryStats:
    """What the ladder came to; grows as it goes. Counts are of concepts unless they say otherwise."""

    tried: int = 0
    """Tries learned."""
    steps: int = 0
    """In all of them."""
    passed: int = 0
    better: int = 0
    """Still below the gate, but a later try was nearer to it."""
    below: int = 0
    """Still below, and no try was nearer to it than the first."""
    learned_before: int = 0
    """Of all these, those that the run found done."""
    waiting: int = 0
    """Not at their ladder's end, when the run was."""
    failures: dict[str, str] = field(default_factory=dict)
    """Of tries: fingerprint -> cause."""

    @property
    def ended(self) -> int:
        """Concepts that were tried again to their ladder's end."""
        return self.passed + self.better + self.below

    def describe(self) -> str:
        """For the last lines and the report; empty if there was nothing to do."""
        counts = {"passed then": self.passed, "better but still below": self.better, "no better": self.below,
                  "to be continued": self.waiting}  # fmt: skip
        told = ", ".join(f"{count:,} {words}" for words, count in counts.items() if count)
        return f"{self.ended + self.waiting:,} ({told})" if told else ""


@dataclass
class RunStats:
    """What became of the run; grows as it goes."""

    rows: int
    until: float = math.inf
    """When no new concept is begun any more, in seconds since 1970."""
    began: float = field(default_factory=time.monotonic)
    learned: int = 0
    retried: int = 0
    """Of the concepts learned or failed, those of which a call was lost with an actor or to storage, and made again."""
    repeated: int = 0
    """Calls to storage that actors made again; this process's own are in `retries.retry_count`."""
    steps: int = 0
    """Of the concepts learned."""
    device_seconds: float = 0.0
    """Seconds of all devices that actors held: of GPUs where there are any, else of CPU cores."""
    on_gpus: bool = False
    climbed: RetryStats = field(default_factory=RetryStats)
    failures: dict[str, str] = field(default_factory=dict)
    """Concept id -> cause."""
    problems: dict[str, str] = field(default_factory=dict)
    """What went wrong beside single concepts: stage -> cause."""
    pictures: str = ""
    stopped: bool = False
    """By a signal."""
    late: bool = False
    """Not all was done when `until` came."""
    stage: str = "learning"
    """What it is doing; at last `ended` or `stopped`."""
    started_at: str = field(default_factory=lambda: now("milliseconds"))

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.stopped or self.late

    def settle(self, record: ConceptRecord) -> None:
        """Take in how a concept ended."""
        self.retried += record.attempts > 1
        if record.status == "done":
            self.learned += 1
            self.steps += record.steps
        else:
            self.failures[record.concept_id] = record.error

    @property
    def calls_repeated(self) -> int:
        """To storage, by actors and this process; those of an actor that died are lost with it."""
        return self.repeated + retries.retry_count.value

    @property
    def device_hours(self) -> float:
        return self.device_seconds / 3600

    def device_time(self) -> str:
        """In words; empty for none."""
        return f"{self.device_hours:,.2f} {'GPU' if self.on_gpus else 'core'}-hours" if self.device_seconds else ""

    def cost(self, settings: ReportConfig) -> str:
        """Of that time, if a price is set; empty if not."""
        price = settings.hour_price * self.device_hours
        return f"{price:,.2f} {settings.currency}".rstrip() if price else ""


class DeviceTime:
    """Adds up how long actors held their devices, from what every progress line tells of their number."""

    def __init__(self, tally: RunStats, devices_per_actor: float) -> None:
        self._tally, self._each, self._before = tally, devices_per_actor, 0.0

    def observe(self, facts: Facts) -> None:
        since = facts["seconds"] - self._before
        self._tally.device_seconds += since * self._each * (facts["ready"] + facts["starting"])
        self._before = facts["seconds"]


def figures_of(config: RunConfig, tally: RunStats, plan: Plan, chosen: Selection = EVERY) -> RunFigures:
    """For the report."""
    facts = {
        "left for another run": f"{plan.num_left:,} concepts ({chosen.words})" if plan.num_left else "",
        "below the gate, tried again": tally.climbed.describe(),
        "calls lost and made again": f"for {tally.retried:,} concepts" if tally.retried else "",
        "storage calls made again": f"{tally.calls_repeated:,}" if tally.calls_repeated else "",
        "steps": f"{tally.steps + tally.climbed.steps:,}" if tally.steps else "",
        "device time": tally.device_time(),
        "pictures": tally.pictures,
        "ended early": "--finish-by" if tally.late else "",
    }
    return RunFigures(
        learned=tally.learned,
        skipped=plan.num_done,
        pending=max(0, plan.num_todo - tally.learned - len(tally.failures)),
        retried=tally.retried
        + sum(count for count in (tally.climbed.passed, tally.climbed.better, tally.climbed.below)),
        cost=tally.cost(config.report),
        seconds=time.monotonic() - tally.began,
        problems=tally.problems,
        facts={name: text for name, text in facts.items() if text} | versions(),
    )


def left_out(plan: Plan, chosen: Selection) -> str:
    """What the options left undone, for a line of counts."""
    return f"{plan.num_left} left out by {chosen.words}, " if plan.num_left else ""


def conclude(config: RunConfig, tally: RunStats, plan: Plan, chosen: Selection = EVERY) -> int:
    """The last lines: counts, where to look, and every failure with its cause. Returns the exit code."""
    tell = partial(say, config.log_format)
    bad = [row for row in plan.bad if chosen.names(row.concept_id)]  # of others nobody asked
    counts = (
        f"{tally.learned} learned, {plan.num_done} done before, {left_out(plan, chosen)}{len(tally.failures)} failed, "
    )
    tell(f"{counts}{len(bad)} bad rows in {format_seconds(time.monotonic() - tally.began)}\n")
    spent = ", ".join(text for text in (tally.device_time(), tally.cost(config.report)) if text)
    lines = {"below the gate, tried again": tally.climbed.describe(), "pictures": tally.pictures, "device time": spent}
    for name, text in lines.items():
        if text:
            tell(f"{name}: {text}\n")
    if tally.stopped:
        tell("stopped before the end; run the same command again to continue\n")
    else:
        tell(redact(f"report: {RunStore(config.output).uri('report.html')}\n"))
    if tally.late and not tally.stopped:
        unlearned = plan.num_todo - tally.learned - len(tally.failures)
        tell(f"ended at --finish-by with {unlearned} not learned; run the same command again to continue\n")
    failures = [f"{name}: {cause}" for name, cause in (*tally.problems.items(), *tally.failures.items())]
    failures += [f"bad row: {describe_bad(row)}" for row in bad]
    for failure in failures[:SHOWN_FAILURES]:
        tell(f"FAILED {failure}\n")
    if len(failures) > SHOWN_FAILURES:
        tell(f"FAILED {len(failures) - SHOWN_FAILURES} more, all in results.parquet\n")
    return STOPPED if tally.stopped else LATE if tally.late else FAILED if failures else OK


def describe_bad(row: BadRow) -> str:
    return f"{row.file}, row {row.row}{f' ({row.concept_id})' if row.concept_id else ''}: {row.reason}"


def describe_run(config: RunConfig, tally: RunStats, plan: Plan, settings: dict[str, Any]) -> bytes:
    """`run.json`: what was run, with what, and how far it got."""
    climbed = tally.climbed
    counts = {
        "rows": tally.rows,
        "done_before": plan.num_done,
        "learned": tally.learned,
        "failed": len(tally.failures),
        "retried": tally.retried,
        "storage_calls_repeated": tally.calls_repeated,
        "problems": tally.problems,
        "bad_rows": len(plan.bad),
        "left_out": plan.num_left,
        "looked_at": plan.num_done + plan.num_todo + plan.num_left + len(plan.bad),
        "steps": tally.steps + climbed.steps,
        "gate": {name: getattr(climbed, name) for name in _GATE_COUNTS},
    }
    description = {
        "stage": tally.stage,
        "started_at": tally.started_at,
        "written_at": now(),
        "config": redacted(to_tree(config)),
        "model_hash": settings["model"],
        "settings": digest(settings),
        "versions": versions(),
        "counts": counts,
        "seconds": round(time.monotonic() - tally.began, 1),
        "device_hours": {"of": "gpu" if tally.on_gpus else "core", "hours": round(tally.device_hours, 4)},
    }
    return json.dumps(description, indent=1).encode()


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "ray")
    return {name: importlib.metadata.version(name) for name in names}
