"""Tests of the estimate from the last run's rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import Plan
from pipeline.report.estimate import read_rate
from pipeline.report.run_stats import DeviceTime, RunStats
from pipeline.report.run_summary import describe_run
from pipeline.report_config import ReportConfig
from pipeline.store.storage import RunStore

SETTINGS = {"model": "m"}


def test_the_rate_is_kept_until_a_run_learns(tmp_path: Path) -> None:
    store, config, plan = RunStore(str(tmp_path)), RunConfig(), Plan("settings", set())
    assert read_rate(store) is None
    stats = RunStats(rows=30, learned=10, on_gpus=True)
    hours = DeviceTime(stats, devices_per_actor=1)
    hours.observe({"seconds": 1800.0, "ready": 3, "starting": 1})
    stats.device_seconds += 999.0  # drawing
    store.put("run.json", describe_run(config, stats, plan, SETTINGS))
    rate = read_rate(store)
    assert rate is not None
    assert rate.describe(20, digest(SETTINGS), ReportConfig(hour_price=2.0, currency="EUR")) == (
        "to learn 20 concepts takes about 1 h 00 min, 4.00 GPU-hours, 8.00 EUR at the rate of the last run: 10 "
        "concepts in 30 min 00 s on 4.0 GPUs"
    )
    said = rate.describe(20, "other", ReportConfig())
    assert said.endswith("on 4.0 GPUs, with other settings; report.hour_price adds the cost")
    store.put("run.json", describe_run(config, RunStats(rows=30), plan, SETTINGS, rate))
    assert read_rate(store) == rate


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"rate": {"x": 1}}', b"{}"])
def test_a_file_without_a_rate_estimates_nothing(content: bytes, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.put("run.json", content)
    assert read_rate(store) is None
