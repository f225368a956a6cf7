"""The way of a run's concepts to its tracker, which a stand-in takes: what it gets, and what its failure costs."""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from pipeline.tracking import sender
from pipeline.tracking.feed import CurveFeed, TrackerFeed, curve_points


def curve(steps: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"step": range(1, steps + 1), "loss": [float(step) for step in range(steps)]}), buffer)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def finished(store: RunStore, name: str, **values: object) -> ConceptRecord:
    """A learned concept with its curve and grid in the store."""
    given = {"status": "done", "steps": 6, "seconds": 2.0, "scores": {"clip_i": 0.8, "clip_t": float("nan")}, **values}
    record = ConceptRecord(concept_id=name, fingerprint=f"f-{name}", placeholder_token=f"<{name}>", **given)  # type: ignore[arg-type]
    store.put(record.folder.curve, curve(6))
    store.put(record.folder.grid, png())
    return record


class StandIn:
    """A tracker that remembers, and fails at what it is told to."""

    def __init__(self, fails_at: str = "", settings: Mapping[str, str] | None = None) -> None:
        self.fails_at = fails_at
        self.settings = dict(settings or {})
        self.values: list[tuple[int, Mapping[str, float]]] = []
        self.curves: list[str] = []
        self.grids: list[tuple[int, str]] = []
        self.may_close = threading.Event()
        self.may_close.set()
        self.is_closed = False

    def _do(self, name: str) -> None:
        if name == self.fails_at:
            raise RuntimeError(f"no {name} today")

    def log_values(self, number: int, values: Mapping[str, float]) -> None:
        self._do("log_values")
        self.values.append((number, values))

    def log_curve(self, concept_id: str, points: Sequence[tuple[int, float]]) -> None:
        self._do("log_curve")
        assert len(points) == 6
        self.curves.append(concept_id)

    def log_grid(self, number: int, concept_id: str, png: bytes) -> None:
        assert Image.open(io.BytesIO(png)).format == "PNG"
        self.grids.append((number, concept_id))

    def close(self) -> None:
        self._do("close")
        self.may_close.wait(60)
        self.is_closed = True


@pytest.fixture
def config() -> RunConfig:
    overrides = ["tracking=tensorboard", "report.tracked=2", "report.webhook=https://hooks.example/secret/path"]
    return load_config(overrides=overrides, output="memory://tracked", manifest="s3://key:word@host/m.parquet")


def tracked(
    config: RunConfig, records: Sequence[ConceptRecord], tracker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(tracking: str, name: str, folder: str, settings: Mapping[str, str]) -> StandIn:
        tracker._do("start")
        assert (tracking, ":" in name, folder.endswith("/tracking")) == ("tensorboard", False, True)
        tracker.settings = dict(settings)
        return tracker

    monkeypatch.setattr(sender, "start_tracker", start)
    feed = TrackerFeed(config, RunStore(config.output))
    for record in records:
        feed.add(record)
    feed.close(60)


def test_every_concept_is_counted_and_the_first_are_shown(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tracker = RunStore(config.output), StandIn()
    failed = ConceptRecord(
        concept_id="bad", fingerprint="f-bad", status="failed", placeholder_token="<bad>", error="no"
    )
    records = [finished(store, "a"), failed, finished(store, "b"), finished(store, "c")]
    tracked(config, records, tracker, monkeypatch)
    assert [number for number, _ in tracker.values] == [1, 2, 3, 4]
    assert tracker.values[0][1] == {
        "concepts/failed": 0, "concept/steps": 6, "concept/seconds": 2.0, "scores/clip_i": 0.8,
    }  # fmt: skip
    assert tracker.values[1][1] == {"concepts/failed": 1}
    assert (tracker.curves, tracker.grids) == (["a", "b"], [(1, "a"), (3, "b")])
    assert tracker.is_closed
    assert tracker.settings["report.webhook"] == "https://hooks.example/***"
    assert tracker.settings["manifest"] == "s3://***@host/m.parquet"
    assert tracker.settings["inversion.steps"] == "500"


def test_files_that_are_gone_are_left_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tracker = RunStore(config.output), StandIn()
    record = finished(store, "lost")
    store.delete(record.folder.grid)
    store.delete(record.folder.curve)
    tracked(config, [record], tracker, monkeypatch)
    assert len(tracker.values) == 1
    assert not tracker.curves
    assert not tracker.grids


@pytest.mark.parametrize("place", ["start", "log_values", "log_curve", "close"])
def test_a_tracker_that_fails_is_told_once(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    store = RunStore(config.output)
    with caplog.at_level(logging.WARNING):
        tracked(config, [finished(store, name) for name in "abc"], StandIn(place), monkeypatch)
    (told,) = [record.message for record in caplog.records]
    assert told == f"tracking = tensorboard failed, nothing more is logged: RuntimeError: no {place} today"


def test_a_slow_tracker_is_not_waited_for(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = StandIn()
    tracker.may_close.clear()
    monkeypatch.setattr(sender, "start_tracker", lambda *_: tracker)
    monkeypatch.setattr(sender, "_MOST_WAITING", 0)
    feed = TrackerFeed(config, RunStore(config.output))
    feed.add(finished(RunStore(config.output), "a"))
    feed.close(0.2)
    tracker.may_close.set()
    assert "did not end in time" in caplog.text
    assert "1 entries were not logged" in caplog.text


def test_without_a_tracker_and_without_concepts_nothing_is_begun(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "start_tracker", lambda *_: pytest.fail("begun"))
    TrackerFeed(config, RunStore(config.output)).close(60)
    plain = RunConfig(output=config.output)
    feed = TrackerFeed(plain, RunStore(plain.output))
    feed.add(finished(RunStore(plain.output), "a"))
    feed.close(60)


def test_each_point_of_a_training_is_logged_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = StandIn()
    monkeypatch.setattr(sender, "start_tracker", lambda *_: tracker)
    feed = CurveFeed(config, RunStore(config.output))
    curve: list[tuple[int, Mapping[str, float]]] = []
    feed.update(curve)
    for step in (5, 10, 15):
        curve.append((step, {"encoder/loss": 1 / step, "encoder/held_out_loss": math.inf if step == 10 else 0.5}))
        feed.update(curve)
        feed.update(curve)
    feed.close(60)
    assert tracker.is_closed
    assert tracker.values == [
        (5, {"encoder/loss": 0.2, "encoder/held_out_loss": 0.5}),
        (10, {"encoder/loss": 0.1}),
        (15, {"encoder/loss": 1 / 15, "encoder/held_out_loss": 0.5}),
    ]


def test_a_curve_is_thinned_to_the_means_of_equal_parts() -> None:
    points = curve_points(curve(1000))
    assert len(points) == 100
    assert points[0] == (10, 4.5)
    assert points[-1] == (1000, 994.5)
    assert curve_points(curve(3)) == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert curve_points(curve(0)) == []
