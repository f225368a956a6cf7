"""Following a run from its output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import watch
from pipeline.exit_codes import LATE, USAGE
from pipeline.store.storage import RunStore

COUNTS = {"rows": 10, "done_before": 2, "learned": 0, "failed": 0, "bad_rows": 1, "left_out": 0, "problems": {}}


def run_json(stage: str, learned: int, started_at: str = "2026-11-27T01:00:00+00:00", **values: Any) -> bytes:
    run = {"stage": stage, "started_at": started_at, "written_at": "2026-11-27T01:30:00+00:00", "seconds": 90.0}
    return json.dumps(run | {"counts": COUNTS | {"learned": learned}} | values).encode()


def writing(store: RunStore, contents: list[bytes]) -> Callable[[], None]:
    """Put the next content at every wait."""
    return lambda: store.put("run.json", contents.pop(0)) if contents else None


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.put("run.json", run_json("learning", 0))
    later = [
        run_json("learning", 0),
        run_json("learning", 3, progress={"in_flight": 4, "ready": 2, "seconds_left": 60}),
    ]
    runs = list(watch.follow(store, writing(store, [*later, run_json("ended", 7, exit_code=0, meaning="all is done")])))
    assert runs.count(None) == 1
    lines = [watch.describe(run) for run in runs if run]
    assert lines[1] == (
        "2026-11-27 01:30:00 UTC  learning: 3 of 7 learned, 2 done before, 1 bad rows, 4 on 2 actors, 1:30 so far, "
        "about 1:00 left"
    )
    assert runs[-1] is not None
    assert watch.describe_end(runs[-1]) == "exit code 0: all is done"


def test_the_next_run_is_waited_for(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.put("run.json", run_json("ended", 7))
    contents = [run_json("ended", 1, "2026-11-28T01:00:00+00:00")]
    *_, last = watch.follow(store, writing(store, contents), skip_first=True)
    assert last is not None
    assert last["started_at"].startswith("2026-11-28")


def test_a_run_that_is_quiet_is_told_once_a_pause(capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([{}, None, None, None, {}, None])
    clock = iter([0.0, 0.0, 300.0, 700.0, 700.0, 1400.0, 1500.0]).__next__
    assert len(list(watch.announce_quiet(looks, "out", clock))) == 2
    assert capsys.readouterr().out.count("run.json has not changed for 11 min 40 s") == 1


def test_the_command_ends_with_the_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([str(tmp_path)]) == USAGE
    assert "no run has begun here" in capsys.readouterr().err
    (tmp_path / "run.json").write_bytes(run_json("ended", 7, exit_code=LATE, meaning="ended at --finish-by"))
    assert watch.main([str(tmp_path)]) == LATE
    assert capsys.readouterr().out.endswith("exit code 76: ended at --finish-by\n")
