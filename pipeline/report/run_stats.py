"""Counts of a run, taken while it goes on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from pipeline.ledger.known_failures import key_of
from pipeline.ledger.records import ConceptRecord
from pipeline.report.progress import ProgressNumbers
from pipeline.report_config import ReportConfig
from pipeline.store import retries
from pipeline.times import now


@dataclass(slots=True)
class RetryStats:
    """Counts of the tries with other settings. The counts are of concepts unless the field says otherwise."""

    tried: int = 0
    """Tries that were learned."""

    steps: int = 0
    """Steps of all tries."""

    passed: int = 0

    better: int = 0
    """Concepts that stay below the gate, with a later try nearer to it than the first."""

    below: int = 0
    """Concepts that stay below the gate, with the first try the nearest to it."""

    learned_before: int = 0
    """Concepts among `passed`, `better` and `below` that had a record before the run."""

    waiting: int = 0
    """Concepts with tries left."""

    @property
    def ended(self) -> int:
        """Concepts without tries left."""
        return self.passed + self.better + self.below

    def describe(self) -> str:
        """Return the counts in words, for the last lines and the report; empty if nothing was to be tried again."""
        counts = {
            "passed then": self.passed,
            "better but still below": self.better,
            "no better": self.below,
            "to be continued": self.waiting,
        }
        words = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return f"{self.ended + self.waiting:,} ({words})" if words else ""


@dataclass
class RunStats:
    """Counts and state of a run."""

    rows: int
    """Rows of the manifest."""

    until: float = math.inf
    """Moment after which no concept is begun, in seconds since 1970."""

    began: float = field(default_factory=time.monotonic)
    """Start of the run, in seconds of the monotonic clock."""

    learned: int = 0

    retried: int = 0
    """Concepts learned or failed after a call was lost, to a dying actor or to storage, and was made again."""

    repeated: int = 0
    """Calls to storage that actors repeated; this process's own are counted by `retries.retry_count`."""

    steps: int = 0
    """Steps of the concepts learned."""

    device_seconds: float = 0.0
    """Seconds that actors held devices, summed over the devices: GPUs where there are any, else CPU cores."""

    learning_s: float = 0.0
    """Wall time of learning, the start of the actors included."""

    learning_device_s: float = 0.0
    """The part of `device_seconds` that learning took."""

    on_gpus: bool = False

    gate_retries: RetryStats = field(default_factory=RetryStats)

    failures: dict[str, str] = field(default_factory=dict)
    """Errors of failed concepts, by concept id."""

    failure_keys: dict[str, str] = field(default_factory=dict)
    """Keys of `known_failures.key_of`, by the id of each failed concept."""

    known_before: frozenset[str] = frozenset()
    """Keys of the failures that do not count again, bad rows included."""

    problems: dict[str, str] = field(default_factory=dict)
    """Errors that are no single concept's, by stage."""

    pictures: str = ""
    """Counts of the bulk pictures, in words."""

    is_stopped: bool = False
    """A signal ended the run, or its output could not be written."""

    is_late: bool = False
    """True if work was left when `until` came."""

    stage: str = "learning"
    """The present stage; at last `ended` or `stopped`."""

    progress: dict[str, float] = field(default_factory=dict)
    """Numbers of the last progress line of learning."""

    exit_code: int | None = None
    """The command's exit code; None until the run has ended."""

    meaning: str = ""
    """The exit code's meaning."""

    started_at: str = field(default_factory=lambda: now("milliseconds"))
    """Start of the run, UTC, ISO 8601."""

    @property
    def is_over(self) -> bool:
        """True when no further work is to be begun."""
        return self.is_stopped or self.is_late

    @property
    def num_settled(self) -> int:
        """Concepts that were learned or failed."""
        return self.learned + len(self.failures)

    def settle(self, record: ConceptRecord) -> None:
        """Count a concept that ended with `record`."""
        self.retried += record.attempts > 1
        if record.status == "done":
            self.learned += 1
            self.steps += record.steps
        else:
            self.failures[record.concept_id] = record.error
            self.failure_keys[record.concept_id] = key_of(record)

    @property
    def calls_repeated(self) -> int:
        """Calls to storage that actors and this process repeated, without those of actors that died."""
        return self.repeated + retries.retry_count.value

    @property
    def device_hours(self) -> float:
        return self.device_seconds / 3600

    def device_time(self) -> str:
        """Return the device hours with their unit; empty if there are none."""
        return f"{self.device_hours:,.2f} {'GPU' if self.on_gpus else 'core'}-hours" if self.device_seconds else ""

    def cost(self, settings: ReportConfig) -> str:
        """Return the price of the device hours with its currency; empty if `report.hour_price` is not set."""
        price = settings.hour_price * self.device_hours
        return f"{price:,.2f} {settings.currency}".rstrip() if price else ""


class DeviceTime:
    """Adds up the time for which actors hold devices, from the number of actors at every progress update."""

    def __init__(self, stats: RunStats, devices_per_actor: float) -> None:
        self._stats = stats
        self._devices_per_actor = devices_per_actor
        self._seconds_before = 0.0

    def observe(self, numbers: ProgressNumbers) -> None:
        """Add the time since the previous update."""
        elapsed_s = numbers["seconds"] - self._seconds_before
        num_actors = numbers["ready"] + numbers["starting"]
        device_s = elapsed_s * self._devices_per_actor * num_actors
        self._stats.device_seconds += device_s
        self._stats.learning_device_s += device_s
        self._stats.learning_s += elapsed_s
        self._seconds_before = numbers["seconds"]
