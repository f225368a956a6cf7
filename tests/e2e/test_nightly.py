"""What a nightly job is told beside its manifest, on real Ray: a quality gate, a deadline."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline import cluster
from pipeline.actor.learner import Learner
from pipeline.exit_codes import FAILED, LATE, OK, STOPPED
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.models import locate
from pipeline.ledger.records import ConceptRecord, load_records
from pipeline.run import main
from pipeline.sample_config import GateConfig
from pipeline.stages import make_plan
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.faults.held import HeldActor, hold_of
from tests.faults.processes import kill
from tests.pipeline.runs import tiny_config, tiny_toml, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
INVERSION = {"steps": STEPS, "batch_size": 2}


def job(tmp_path: Path, model: Path, name: str, **changes: object) -> list[str]:
    """The command for a manifest of two concepts; its output is `name`."""
    manifest = tmp_path / "manifest.parquet"
    if not manifest.exists():
        write_manifest(tmp_path, ["a", "b"])
    settings = {
        "extractor": locate("demo/clip"),
        "inversion": INVERSION,
        "actors": {"count": 1},
    }
    (tmp_path / f"{name}.toml").write_text(tiny_toml(model, **{**settings, **changes}))
    return [str(manifest), "--config", str(tmp_path / f"{name}.toml"), "--output", str(tmp_path / name)]


def records(output: Path) -> dict[str, ConceptRecord]:
    """Of the run's own settings."""
    run = json.loads((output / "run.json").read_text())
    found = load_records(RunStore(str(output)))
    return {record.concept_id: record for record in found if record.inputs["settings"] == run["settings"]}


def test_a_try_is_what_a_run_with_its_settings_learns(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder = {"min_clip_i": 2.0, "ladder": ["seed", "steps*2"]}  # which nothing reaches
    gate = {**ladder, "others": str(tmp_path / "manifest.parquet")}
    hour_price = {"hour_price": 2.5, "currency": "EUR"}
    command = job(tmp_path, tiny_model, "gated", gate=gate, report=hour_price)
    assert main(command) == OK
    said = capsys.readouterr().out
    assert said.startswith("2 learned, 0 done before, 0 failed")
    assert "below the gate, tried again: 2 (" in said
    assert re.search(r"core-hours, \d+\.\d\d EUR", said), said

    gated = records(tmp_path / "gated")
    other = learned_calmly(tiny_model, tmp_path / "other-seed", command[0], seed=1, inversion=INVERSION)
    for name, record in gated.items():
        assert record.gate == "below"
        assert all("clip_i_others" in each.scores for each in record.tries)
        assert [each.rung for each in record.tries] == ["", "seed", "steps*2"]
        assert [each.steps for each in record.tries] == [STEPS, STEPS, 2 * STEPS]
        likeness = [each.scores["clip_i"] for each in record.tries]
        assert record.scores["clip_i"] == max(likeness)
        assert record.tries[1].fingerprint == other[name].fingerprint
        assert record.tries[1].files["curve.parquet"] == other[name].files["curve.parquet"]
        assert record.tries[1].files["grid.png"] == other[name].files["grid.png"]
    rows = read_table(tmp_path / "gated" / "results.parquet").to_pylist()
    assert {row["concept_id"]: (row["gate"], row["tries"], row["embedding"]) for row in rows} == {
        name: ("below", 3, record.result.embedding) for name, record in gated.items()
    }
    page = (tmp_path / "gated" / "report.html").read_text()
    assert "below the gate" in page

    assert main(command) == OK
    assert capsys.readouterr().out.startswith("0 learned, 2 done before")


def learned_calmly(model: Path, output: Path, manifest: str, **settings: Any) -> dict[str, ConceptRecord]:
    """Plan every concept and learn it alone in this process."""
    config = tiny_config(model, output, **{"manifest": manifest, "extractor": locate("demo/clip"), **settings})
    plan, _ = make_plan(config, RunStore(config.output))
    learner = Learner(replace(config, gate=GateConfig(ladder=())))

    async def learn() -> dict[str, ConceptRecord]:
        tasks = plan.tasks(read_manifest(manifest))
        return {task.concept.concept_id: await learner.learn(task) for task in tasks}

    learned = asyncio.run(learn())
    learner.close()
    return learned


def test_a_ladder_that_was_stopped_goes_on_to_the_same_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "ModelActor", HeldActor)
    hold_of(tmp_path / "out").write_text("1")
    settings = {"inversion": {"steps": 30, "batch_size": 2}, "actors": {"count": 1, "checkpoint_steps": 5}}
    command = job(tmp_path, tiny_model, "out", gate={"min_clip_i": 2.0, "ladder": ["seed"]}, **settings)
    concepts = tmp_path / "out" / "concepts"

    def stop_in_the_ladder() -> None:
        """When a concept that has a record has a checkpoint, too, behind which its actor waits."""
        while not any({"record.json", "checkpoint.safetensors"} <= {path.name for path in concept.rglob("*.*")}
                      for concept in concepts.glob("*")):  # fmt: skip
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_the_ladder, daemon=True).start()
    assert main(command) == STOPPED
    assert list(concepts.rglob("ladder.json"))
    capsys.readouterr()
    assert main(command) == OK
    assert capsys.readouterr().out.startswith("0 learned, 2 done before")
    found = records(tmp_path / "out")
    for number in (0, 1):
        calm = learned_calmly(tiny_model, tmp_path / f"calm-{number}", command[0], seed=number, **settings)
        for name, record in found.items():
            tried = record.tries[number]
            assert tried.fingerprint == calm[name].fingerprint
            for each in ("curve.parquet", "grid.png"):
                assert tried.files[each] == calm[name].files[each]
    assert len(found) == 2
    assert not list(concepts.rglob("ladder.json"))
    assert not list(concepts.rglob("checkpoint.safetensors"))


def test_a_ladder_that_is_killed_goes_on_to_the_same_end(tiny_model: Path, tmp_path: Path) -> None:
    """Killed when each concept has a second try that has ended, and is in the middle of its third."""
    gate = {"min_clip_i": 2.0, "ladder": ["seed", "steps*2"]}
    settings = {"inversion": {"steps": 20, "batch_size": 2}, "actors": {"count": 1, "checkpoint_steps": 5}}
    command, calm = (job(tmp_path, tiny_model, name, gate=gate, **settings) for name in ("killed", "calm"))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    held = [sys.executable, "-c", "from tests.faults.held import main; main()", *command]
    hold_of(tmp_path / "killed").write_text("2")
    driver = subprocess.Popen(held, cwd=ROOT, env=environment)
    concepts = tmp_path / "killed" / "concepts"
    while not list(concepts.rglob("checkpoint.safetensors")) or len(list(concepts.rglob("record.json"))) < 4:
        assert driver.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    kill(driver.pid)
    assert driver.wait() == -signal.SIGKILL

    assert main(command) == main(calm) == OK
    ends = [
        {
            name: (
                record.gate,
                record.kept,
                record.files,
                record.scores,
                [(each.rung, each.files) for each in record.tries],
            )
            for name, record in records(tmp_path / output).items()
        }
        for output in ("killed", "calm")
    ]
    assert ends[0] == ends[1]
    assert [len(tries) for *_, tries in ends[0].values()] == [3, 3]
    assert not list(concepts.rglob("ladder.json"))


def test_a_deadline_ends_a_run_that_the_next_continues(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\n")
    command = [*job(tmp_path, tiny_model, "out", extractor=""), "--prompts", str(prompts)]
    began = time.monotonic()
    assert main([*command, "--finish-by", "2020-01-01T06:00"]) == LATE
    assert time.monotonic() - began < 60
    said = capsys.readouterr().out
    assert said.startswith("0 learned, 0 done before, 0 failed")
    assert "ended at --finish-by with 2 not learned; run the same command again to continue" in said
    assert "2" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["stage"] == "ended"

    assert main([*command, "--finish-by", "+1h"]) == OK
    assert capsys.readouterr().out.startswith("2 learned")
    prompts.write_text("a photo of a {}\na picture of a {}\n")
    assert main([*command, "--finish-by", "2020-01-01T06:00"]) == LATE, "there are pictures to draw"
    assert main(command) == OK
    assert "pictures: 2 drawn, 2 done before" in capsys.readouterr().out
    assert main([*command, "--finish-by", "2020-01-01T06:00"]) == OK, "there is nothing to be late for"


def test_prune_is_the_last_thing_a_run_does(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = job(tmp_path, tiny_model, "out", extractor="")
    learned_calmly(tiny_model, tmp_path / "out", command[0], inversion=INVERSION, extractor="")
    table = read_table(command[0])
    pq.write_table(table.slice(0, 1), command[0])
    assert main([*command, "--dry-run", "--prune"]) == FAILED
    assert "--prune would delete 50 % of the concepts" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--prune", "--prune-at-most=1"]) == OK
    assert "--prune would delete concept b, which has no row" in capsys.readouterr().out
    assert main(command) == OK
    assert (tmp_path / "out" / "concepts" / "b").exists(), "without the option it is kept"
    capsys.readouterr()
    assert main([*command, "--prune", "--prune-at-most", "50%"]) == OK
    assert "deleted 1 concepts without a row" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out" / "concepts").rglob("record.json")} == {"record.json"}
    assert not list((tmp_path / "out" / "concepts").glob("b/*/*"))
