"""The rate at which an output's last run learned, and what a run would take at that rate."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.report.run_file import read_run
from pipeline.report.run_stats import RunStats
from pipeline.report_config import ReportConfig
from pipeline.store.storage import RunStore
from pipeline.times import format_duration

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Time that learning took in the last run that learned anything."""

    concepts: int
    """Concepts that it learned."""

    seconds: float
    """Wall time of its learning, the start of the actors included."""

    device_seconds: float
    """Seconds that actors held devices meanwhile, summed over the devices."""

    of: str
    """`GPU` or `core`."""

    settings: str
    """Digest of its settings."""

    def describe(self, num_concepts: int, settings: str, prices: ReportConfig) -> str:
        """Return the time, device-hours and price of learning `num_concepts` concepts, in one line."""
        share = num_concepts / self.concepts
        hours = share * self.device_seconds / 3600
        price = f", {hours * prices.hour_price:,.2f} {prices.currency}".rstrip() if prices.hour_price else ""
        changed = ", with other settings" if settings != self.settings else ""
        advice = "" if prices.hour_price else "; report.hour_price adds the cost"
        return (
            f"to learn {num_concepts:,} concepts takes about {format_duration(share * self.seconds)}, "
            f"{hours:,.2f} {self.of}-hours{price} at the rate of the last run: {self.concepts:,} concepts in "
            f"{format_duration(self.seconds)} on {self.device_seconds / self.seconds:.1f} {self.of}s{changed}{advice}"
        )


NO_RATE = "no earlier run to estimate from; learn a few with --limit 20 and ask again (report.hour_price adds the cost)"


def rate_of(stats: RunStats, settings: str) -> Rate | None:
    """Return the rate of a run so far; None if it has learned nothing."""
    if not stats.learned or not stats.learning_s:
        return None
    return Rate(
        concepts=stats.learned,
        seconds=round(stats.learning_s, 1),
        device_seconds=round(stats.learning_device_s, 1),
        of="GPU" if stats.on_gpus else "core",
        settings=settings,
    )


def read_rate(store: RunStore) -> Rate | None:
    """Return the rate in the output's `run.json`; None if there is no such file or no rate in it."""
    try:
        rate = read_run(store).get("rate")
    except FileNotFoundError:
        return None
    except ValueError as error:  # the next run writes the file anew
        log.warning("there is no earlier rate: %s", error)
        return None
    return Rate(**{each.name: rate[each.name] for each in fields(Rate)}) if rate else None


def as_json(rate: Rate | None) -> dict[str, Any] | None:
    """Return the rate as `read_rate` reads it."""
    return asdict(rate) if rate else None
