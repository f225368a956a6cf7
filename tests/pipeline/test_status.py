"""The command and its words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.exit_codes import OK, USAGE
from pipeline.report.failures import Cause
from pipeline.report.run_status import AttemptInfo, RunStatus
from pipeline.status import describe, main
from pipeline.store.storage import RunStore
from tests.pipeline.outputs import end, make_photos, put_manifest, put_run, settings, tasks_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_at_work_reads_well() -> None:
    status = RunStatus(
        output="s3://b/out",
        stage="learning",
        alive=True,
        started_at="2026-01-02T01:00:00+00:00",
        quiet_s=12.3,
        manifest="s3://b/m.parquet",
        rows=10_000,
        looked_at=8_000,
        done=7_000,
        done_before=6_500,
        failed=3,
        learning=8,
        waiting=2_989,
        concepts_per_hour=100.0,
        recent_per_hour=120.4,
        seconds_left=7800.0,
        median_s=61.0,
        slowest=[AttemptInfo(concept_id="owl", seconds=600.0, steps=500, attempts=2)],
        causes=[Cause("lost_worker", "out of memory", ("owl", "fox"), 2), Cause("bug", "no such key", ("cat",), 1)],
    )
    assert (
        "\n".join(describe(status))
        == """\
s3://b/out
  learning, last wrote 12 s ago; began 2026-01-02 01:00:00 UTC
  manifest s3://b/m.parquet, 10,000 rows

    7,000  done: 6,500 before, 500 by this run
        3  failed
        8  being learned
    2,989  waiting
     rate  100 concepts an hour, 120 recently; at most 2 h 10 min left
   median  1 min 01 s a concept
  slowest  owl, 10 min 00 s, 500 steps, 2 attempts

failures by kind and cause
        2  lost worker: run again; a concept that loses its worker every time needs more memory than the worker has, \
or more time than actors.stall_s
          2  out of memory
             owl, fox
        1  bug in this software: report it with the traceback in the concept's log.jsonl; the input is not at fault
          1  no such key
             cat

details of one failure: python -m pipeline.explain s3://b/out owl"""
    )


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("learning", "DEAD, or hung while learning: nothing was written for 2 h 00 min"),
        ("stopped", "stopped by a signal 2 h 00 min ago"),
        ("ended", "ended 2 h 00 min ago"),
        (None, "last written 2 h 00 min ago"),
    ],
)
def test_it_says_whether_anything_is_at_work(stage: str | None, line: str) -> None:
    lines = list(describe(RunStatus(output="o", stage=stage, quiet_s=7200)))
    assert lines[1].strip() == line
    assert ("run the same command again" in lines[-1]) == (stage in ("learning", "stopped"))


def test_a_run_that_its_storage_stopped_was_stopped_by_no_signal() -> None:
    status = RunStatus(output="o", stage="stopped", quiet_s=7200, problems={"learning": "given up: storage failed"})
    assert list(describe(status))[1].strip() == "stopped 2 h 00 min ago"


def test_problems_beside_concepts_and_what_was_not_read_are_told() -> None:
    causes = [Cause("bad_input", f"cause {i}", ("unnamed",), 1) for i in range(12)]
    status = RunStatus(
        output="o", stage="ended", problems={"learning": "given up: no actor starts"}, causes=causes, unread=9
    )
    lines = list(describe(status))
    assert "  PROBLEM  learning: given up: no actor starts" in lines
    assert lines[-2].strip() == "2 more causes, all with --json"
    assert lines[-1].startswith("\n9 records were not read")


def test_the_command(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat"))
    end(store, tasks_of(manifest, settings())["cat"], status="failed", error="no such photo", error_kind="bad_input")
    put_run(store, manifest, settings(), started_at="2000-01-01T00:00:00+00:00")
    assert main([root]) == OK
    assert "          1  no such photo\n" in capsys.readouterr().out
    assert main([root, "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert (said["failed"], said["causes"][0]["kind"], said["causes"][0]["names"]) == (1, "bad_input", ["cat"])
    assert main([f"{root}/elsewhere"]) == USAGE
    assert "error: no run at " in capsys.readouterr().err


def test_a_store_of_no_known_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ssh://host/out"]) == USAGE
    assert "ssh" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["explain", "cat"]])
def test_a_store_without_credentials_is_named(arguments: list[str]) -> None:
    nobody = {
        "PATH": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "HOME": "/none",
    }
    command = [sys.executable, "-m", f"pipeline.{arguments[0]}", "s3://bucket/out", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, env=nobody, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert done.stderr == (
        "error: Unable to locate credentials; give the store's client credentials, such as "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY\n"
    )


@pytest.mark.parametrize("module", ["status", "explain"])
def test_nothing_heavy_is_loaded(module: str) -> None:
    heavy = "{'ray', 'torch', 'transformers'} & set(sys.modules)"
    script = f"import sys; from pipeline import {module}; print(*{heavy})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
