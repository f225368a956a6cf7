"""Export metrics to Prometheus: the driver those of the run, each actor those of its device.

Ray's agent on each node exports the series as `ray_<name>`, with the labels of the process that made them. No tag names
a concept: a night has thousands of them, and each would be a series of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.ledger.records import ConceptRecord
from pipeline.report.outcome import Outcome
from pipeline.report.progress import ProgressNumbers
from pipeline.store.errors import describe_error

if TYPE_CHECKING:
    from pipeline.actor.vitals import Vitals

log = logging.getLogger(__name__)

COUNTERS = {
    "concepts_done": "Concepts learned by this run",
    "concepts_failed": "Concepts that failed in this run, those given up included",
    "concepts_retried": "Calls lost with an actor, its node or storage, and made again",
    "concepts_quarantined": "Concepts given up after actors.max_attempts lost calls",
    "learner_steps": "Optimizer steps of all concepts of an actor together",
}
GAUGES = {
    "concepts_planned": "Concepts that this run is to learn, as far as the manifest has been read",
    "concepts_left": "Concepts of those planned that have neither ended well nor failed",
    "concepts_in_flight": "Concepts handed to actors",
    "concepts_failures_new": "Bad rows and failed concepts that are not known from a run before",
    "concepts_failures_tolerated": "Largest number of these with which the run does not fail",
    "concepts_eta_seconds": "Time until all are learned, at the run's rate so far",
    "actors_ready": "Actors that have loaded the model",
    "actors_starting": "Actors that wait for a node or load the model",
    "learner_slots": "Concepts an actor can learn side by side",
    "learner_slots_used": "Concepts an actor learns side by side now",
    "learner_loss": "Mean over an actor's slots of the last loss read",
    "learner_device_bytes": "Memory that torch holds on an actor's GPU; 0 on a CPU",
    "learner_host_bytes": "Most main memory an actor has held",
}
HISTOGRAMS = {"concepts_seconds": "Wall time of a concept in its slot"}
"""Names and descriptions of all series."""

_BOUNDARIES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
"""Bounds of the histogram's buckets."""

_EVERY_S = 2.0
"""Time between two exports of an actor's numbers."""


def exported_names() -> set[str]:
    """Return the names of all series in Prometheus."""
    return {
        *(f"ray_{name}_total" for name in COUNTERS),
        *(f"ray_{name}" for name in GAUGES),
        *(f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")),
    }


class RunMetrics:
    """Metrics of a run, exported by its driver. To be made after ray.init."""

    def __init__(self) -> None:
        self._counters = {name: _Total(name) for name in COUNTERS if name.startswith("concepts_")}
        names = [name for name in GAUGES if not name.startswith("learner_")]
        self._gauges = {name: Gauge(name, GAUGES[name]) for name in names}
        (name,) = HISTOGRAMS
        self._seconds = Histogram(name, HISTOGRAMS[name], boundaries=list(_BOUNDARIES_S))
        self._failures = {"concepts_failures_new": 0, "concepts_failures_tolerated": 0}

    def observe(self, numbers: ProgressNumbers) -> None:
        """Export the numbers of a progress line, with the driver's counts.

        To be called more often than Ray exports: a gauge has a series only in an interval in which it was set.
        """
        for name, counter in self._counters.items():
            counter.reach(numbers[name.removeprefix("concepts_")])
        self._gauges["concepts_planned"].set(numbers["total"])
        self._gauges["concepts_left"].set(max(0, numbers["total"] - numbers["done"] - numbers["failed"]))
        self._gauges["concepts_in_flight"].set(numbers["in_flight"])
        self._gauges["actors_ready"].set(numbers["ready"])
        self._gauges["actors_starting"].set(numbers["starting"])
        self._export_failures()
        if "seconds_left" in numbers:
            self._gauges["concepts_eta_seconds"].set(numbers["seconds_left"])

    def count_failures(self, outcome: Outcome) -> None:
        """Export how many failures are new and how many of them are tolerated, from now on with the other numbers."""
        self._failures = {"concepts_failures_new": outcome.num_new, "concepts_failures_tolerated": outcome.limit}
        self._export_failures()

    def _export_failures(self) -> None:
        for name, value in self._failures.items():
            self._gauges[name].set(value)

    def settled(self, record: ConceptRecord) -> None:
        """Export how long a finished concept took."""
        if record.status == "done":
            self._seconds.observe(record.seconds)


def export(vitals: Callable[[], Vitals]) -> None:
    """Start a thread that exports an actor's numbers for as long as its process lives."""
    counter = _Total("learner_steps")
    gauges: Mapping[str, Gauge] = {name: Gauge(name, GAUGES[name]) for name in GAUGES if name.startswith("learner_")}

    def watch() -> None:
        rest = threading.Event()
        while not rest.wait(_EVERY_S):
            try:
                now = vitals()
            except Exception as error:  # metrics must not end the actor; a bug is logged every time
                log.warning("no metrics for this moment: %s", describe_error(error))
                continue
            counter.reach(now.steps)
            gauges["learner_slots"].set(now.slots)
            gauges["learner_slots_used"].set(now.slots_used)
            if now.losses:
                gauges["learner_loss"].set(sum(now.losses) / len(now.losses))
            gauges["learner_device_bytes"].set(now.device_bytes)
            gauges["learner_host_bytes"].set(now.host_bytes)

    threading.Thread(target=watch, name="metrics", daemon=True).start()


class _Total:
    """Counter that is given its value and not its growth.

    Ray exports no zeros: there is no series until the value is above 0.
    """

    def __init__(self, name: str) -> None:
        self._counter = Counter(name, COUNTERS[name])
        self._value = 0.0

    def reach(self, value: float) -> None:
        if value > self._value:
            self._counter.inc(value - self._value)
            self._value = value
