"""`run.json` is read as it was written, and refused with the place of the first thing that is no part of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import status, watch
from pipeline.config import RunConfig
from pipeline.exit_codes import USAGE
from pipeline.ledger.plan import Plan
from pipeline.report.run_file import RUN_FILE, read_run
from pipeline.report.run_stats import RunStats
from pipeline.report.run_summary import describe_run
from pipeline.store.storage import RunStore


def written() -> dict[str, Any]:
    stats = RunStats(rows=3, progress={"in_flight": 1.0}, problems={"report": "not written"})
    tree: dict[str, Any] = json.loads(describe_run(RunConfig(), stats, Plan("settings", set()), {"model": "m"}))
    return tree


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    tree = written()
    store.put(RUN_FILE, json.dumps(tree).encode())
    assert read_run(store) == tree


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((), None, "should be an object"),
        ((), [], "should be an object"),
        (("counts",), None, "counts: "),
        (("counts", "rows"), "3", "counts.rows: "),
        (("counts", "problems"), ["x"], "counts.problems: "),
        (("counts", "gate"), {"below": True}, "counts.gate.below: "),
        (("started_at",), "yesterday", "started_at: "),
        (("started_at",), "2026-11-27T01:00:00", "since 1970 with a zone"),
        (("config",), [], "config: "),
        (("config", "manifest"), {}, "config.manifest: "),
        (("progress", "in_flight"), float("nan"), "progress.in_flight: "),
        (("rate",), {"concepts": 0}, "rate.concepts: "),
        (("stage",), 7, "stage: "),
        (("exit_code",), "0", "exit_code: "),
    ],
)
def test_what_is_no_part_of_a_run_is_named(
    path: tuple[str, ...], value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree: Any = {"": written()}
    *parents, last = ("", *path)
    place = tree
    for name in parents:
        place = place[name]
    place[last] = value
    (tmp_path / RUN_FILE).write_text(json.dumps(tree[""]))
    with pytest.raises(ValueError, match=r"run\.json does not describe a run .*; delete it") as refusal:
        read_run(RunStore(str(tmp_path)))
    assert said in str(refusal.value)
    for command in (status.main, watch.main):
        assert command([str(tmp_path)]) == USAGE
        assert said in capsys.readouterr().err
