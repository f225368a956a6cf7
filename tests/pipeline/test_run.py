"""The command's own logic, without a cluster: settings, dry run, last words."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import stages
from pipeline.config import ReportConfig, RunConfig
from pipeline.exit_codes import FAILED, LATE, OK, STOPPED, USAGE
from pipeline.inputs.manifest import BadRow
from pipeline.inputs.models import ROOT, locate, portable
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import Plan
from pipeline.ledger.records import ConceptRecord
from pipeline.ledger.settings import captions_hash
from pipeline.report.page import build_report
from pipeline.report.run_stats import DeviceTime, RunStats
from pipeline.report.run_summary import conclude, figures_of
from pipeline.run import configure, main, parse
from pipeline.stages import stopping_on_signals
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_toml, write_manifest


def configured(*arguments: str) -> RunConfig:
    return configure(parse(list(arguments)))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text('model = "from/file"\nseed = 3\n[inversion]\nsteps = 10\nbatch_size = 2\n')
    config = configured(
        "sets/cats.parquet", "--config", str(job), "--model", "owner/name", "--set", "inversion.steps=20",
        "--prompts", "p.txt",
    )  # fmt: skip
    assert (config.model, config.seed) == ("owner/name", 3)
    assert (config.inversion.steps, config.inversion.batch_size) == (20, 2)
    assert config.generation.prompts == "p.txt"
    assert config.manifest == os.path.abspath("sets/cats.parquet")
    assert config.output == os.path.abspath("output/cats")


def test_addresses_stay_what_workers_can_use(tmp_path: Path) -> None:
    config = configured("s3://bucket/m.parquet", "--output", "s3://bucket/out", "--model", str(tmp_path))
    assert (config.manifest, config.output, config.model) == ("s3://bucket/m.parquet", "s3://bucket/out", str(tmp_path))
    assert configured("s3://bucket/night/*.parquet").output.startswith(os.path.abspath("output"))


def test_captions_are_found_from_anywhere_and_known_by_content(tmp_path: Path) -> None:
    given = ["inversion.penalties.captions=sets/captions.txt", "inversion.penalties.knowledge=0.1"]
    config = configured("m.parquet", "--set", "inversion.adapter.kind=lora", *(f"--set={each}" for each in given))
    assert config.inversion.penalties.captions == os.path.abspath("sets/captions.txt")
    assert configured("m.parquet").inversion.penalties.captions == captions_hash("") == ""
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n")
    first = captions_hash(str(path))
    path.write_text("a dog\n")
    assert captions_hash(str(path)) != first
    with pytest.raises(ValueError, match=r"penalties.captions = '.*gone.txt' cannot be read"):
        captions_hash(str(tmp_path / "gone.txt"))


def test_the_demo_judge_scores_the_demo_model_only() -> None:
    assert configured("m.parquet").extractor == RunConfig().extractor
    assert configured("m.parquet", "--model", locate(RunConfig().model)).extractor == RunConfig().extractor
    assert configured("m.parquet", "--model", "owner/name").extractor == ""
    assert configured("m.parquet", "--model", "owner/name", "--set", "extractor=owner/clip").extractor == "owner/clip"


def test_models_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert portable("tests") == "tests"
    assert locate("tests") == str(ROOT / "tests")
    assert portable("mine") == locate("mine") == str(tmp_path / "mine")
    assert portable("owner/name") == locate("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no manifest"),
        (["m.parquet", "--set", "inversion.stepz=3"], "did you mean inversion.steps"),
        (["m.parquet", "--model", "no/such/model/here"], "neither a directory here nor a hub id"),
        (["ssh://host/m.parquet"], "ssh"),
        (["m.parquet", "--finish-by", "soon"], "--finish-by 'soon': write 06:00"),
        (["m.parquet", "--set", 'gate.ladder=["sed"]'], "gate.ladder: 'sed'"),
        (
            ["m.parquet", "--set=inversion.penalties.captions=s3://b/c.txt", "--set=inversion.penalties.knowledge=1"],
            "the path of a file on a disk",
        ),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == USAGE
    assert message in capsys.readouterr().err


def test_dry_run_names_bad_rows_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a", "b", "c"], category=["object", "thing", "style"])
    (tmp_path / "photos" / "c-1.png").unlink()
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    output = tmp_path / "out"
    assert main([str(manifest), "--config", str(job), "--output", str(output), "--dry-run"]) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("0 done, 1 to do, 2 bad rows, 0 prompts")
    assert "row 2 (b): category 'thing'" in lines[0]
    assert "row 3 (c): photo " in lines[1]
    assert not output.exists()


def test_a_run_with_nothing_to_do_needs_no_cluster(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "manifest.parquet"
    images = pa.array([], pa.list_(pa.string()))
    pq.write_table(pa.table({"concept_id": pa.array([], pa.string()), "images": images}), path)
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    monkeypatch.setattr(stages, "connect", lambda _: pytest.fail("a cluster was asked for"))
    assert main([str(path), "--config", str(job), "--output", str(tmp_path / "out")]) == OK
    assert "report: " in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()


def test_a_selection_is_counted_and_what_is_left_is_no_failure(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a", "b", "c"], category=["object", "thing", "style"])
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    command = [str(manifest), "--config", str(job), "--output", str(tmp_path / "out")]
    assert main([*command, "--dry-run", "--only", "c"]) == FAILED
    assert capsys.readouterr().out.endswith(
        f"0 done, 1 to do, 1 left out by --only c, 1 bad rows, 0 prompts; output {tmp_path / 'out'}\n"
    )
    assert main([*command, "--only", "d,a"]) == USAGE
    assert "no concept 'd' in manifest" in capsys.readouterr().err

    monkeypatch.setattr(stages, "connect", lambda _: pytest.fail("a cluster was asked for"))
    assert main([*command, "--retry", "failed"]) == OK
    assert capsys.readouterr().out.startswith("0 learned, 0 done before, 2 left out by --retry failed, 0 failed, 0 bad")
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (written["stage"], written["counts"]["left_out"], written["counts"]["looked_at"]) == ("ended", 2, 3)
    settings = json.loads((tmp_path / "out" / "settings" / f"{written['settings']}.json").read_text())
    assert digest(settings) == written["settings"]
    assert settings["model"] == written["model_hash"]
    assert "2 concepts (--retry failed)" in (tmp_path / "out" / "report.html").read_text()


def test_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory://"):
        stages.connect(RunConfig(output="memory://out"))


def test_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = RunConfig(output=str(tmp_path)), Plan("settings", set())
    assert conclude(config, RunStats(rows=2, learned=2), plan) == OK
    capsys.readouterr()

    stats = RunStats(rows=30, learned=5, failures={f"c{i}": "no photo" for i in range(25)})
    plan.bad.append(BadRow(file="m.parquet", row=7, concept_id=None, reason="no concept_id"))
    stats.problems["drawing"] = "stopped"
    assert conclude(config, stats, plan) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 learned, 0 done before, 25 failed, 1 bad rows in 0:0")
    assert lines[1] == f"report: {RunStore(str(tmp_path)).uri('report.html')}"
    assert lines[2:4] == ["FAILED drawing: stopped", "FAILED c0: no photo"]
    assert lines[-1] == "FAILED 7 more, all in results.parquet"

    stats.is_late, plan.num_todo = True, 32
    assert conclude(config, stats, plan) == LATE
    assert "ended at --finish-by with 2 not learned" in capsys.readouterr().out
    stats.is_stopped = True
    assert conclude(config, stats, plan) == STOPPED


def test_what_a_run_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ReportConfig(hour_price=2.5, currency="EUR")
    config, plan = RunConfig(output=str(tmp_path), report=report), Plan("settings", set())
    stats = RunStats(rows=1, on_gpus=True)
    hours = DeviceTime(stats, devices_per_actor=0.5)
    for seconds, ready in ((3600.0, 4), (7200.0, 8)):  # half a GPU each
        hours.observe({"seconds": seconds, "ready": ready, "starting": 0})
    conclude(config, stats, plan)
    assert "device time: 6.00 GPU-hours, 15.00 EUR\n" in capsys.readouterr().out
    assert figures_of(config, stats, plan).cost == "15.00 EUR"
    assert stats.cost(ReportConfig()) == ""


def test_calls_lost_and_tries_are_counted(tmp_path: Path) -> None:
    stats, plan = RunStats(rows=3), Plan("settings", set())
    for name, attempts, status in (("a", 1, "done"), ("b", 3, "done"), ("c", 3, "failed")):
        stats.settle(
            ConceptRecord(
                concept_id=name, fingerprint="f", status=status, placeholder_token="<x>", attempts=attempts, steps=5
            )
        )
    stats.gate_retries.passed = 1
    figures = figures_of(RunConfig(output=str(tmp_path)), stats, plan)
    assert (figures.learned, figures.retried, figures.facts["steps"]) == (2, 3, "10")
    assert figures.facts["below the gate, tried again"] == "1 (1 passed then)"


def test_the_page_tells_of_a_stage_that_was_given_up(tmp_path: Path) -> None:
    stats = RunStats(rows=1)
    stats.problems["learning"] = "given up: no actor starts"
    config = RunConfig(output=str(tmp_path))
    build_report(RunStore(config.output), config, figures_of(config, stats, Plan("settings", set())))
    assert "given up: no actor starts" in (tmp_path / "report.html").read_text()


def test_the_first_signal_stops_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
