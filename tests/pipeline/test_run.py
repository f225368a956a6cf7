"""The command's own logic, without a cluster: settings, dry run, last words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import stages
from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED, OK, STOPPED, TOLERATED, USAGE
from pipeline.inputs.models import ROOT, demo_budget_note, demo_note, locate, portable
from pipeline.ledger.digest import digest
from pipeline.ledger.gate import verdict
from pipeline.ledger.records import StoredFile
from pipeline.ledger.settings import captions_hash, current_settings
from pipeline.run import configure, main, parse
from pipeline.store import disk
from pipeline.store.storage import RunStore
from tests.pipeline import outputs
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_sd3 import tiny_stable_diffusion_3
from textual_inversion.model_checks import NO_UP_PATH


def configured(*arguments: str) -> RunConfig:
    return configure(parse(list(arguments)))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text('model = "from/file"\nseed = 3\n[inversion]\nsteps = 10\nbatch_size = 2\n')
    config = configured(
        "sets/cats.parquet",
        "--config",
        str(job),
        "--model",
        "owner/name",
        "--set",
        "inversion.steps=20",
        "--prompts",
        "p.txt",
    )
    assert (config.model, config.seed) == ("owner/name", 3)
    assert (config.inversion.steps, config.inversion.batch_size) == (20, 2)
    assert config.generation.prompts == "p.txt"
    assert config.manifest == os.path.abspath("sets/cats.parquet")
    assert config.output == os.path.abspath("output/cats")


def test_addresses_stay_what_workers_can_use(tmp_path: Path) -> None:
    config = configured("s3://bucket/m.parquet", "--output", "s3://bucket/out", "--model", str(tmp_path))
    assert (config.manifest, config.output, config.model) == ("s3://bucket/m.parquet", "s3://bucket/out", str(tmp_path))
    assert configured("s3://bucket/night/*.parquet").output.startswith(os.path.abspath("output"))


def test_no_output_lies_in_rays_copy_of_the_jobs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for arguments in (["m.parquet"], ["m.parquet", "--output", "out"], ["m.parquet", "--set", "output=a/b"]):
        with pytest.raises(ValueError, match=r"lies in Ray's own copy .*; name a place that all nodes see"):
            configured(*arguments)
    assert configured("m.parquet", "--output", str(tmp_path / "out")).output == str(tmp_path / "out")


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


def test_the_demo_model_needs_fewer_samples() -> None:
    assert demo_budget_note(configured("photos/my-dog")).startswith(
        "500 steps of 4 samples are for models of photographs"
    )
    for given in (["--config", "demo"], ["--set", "inversion.steps=100"], ["--model", "owner/name"]):
        assert demo_budget_note(configured("photos/my-dog", *given)) == ""


def test_the_demo_model_says_what_it_knows_and_passes_no_gate_elsewhere() -> None:
    other, own = configured("photos/my-dog"), configured(str(ROOT / "manifests/demo.parquet"))
    assert demo_note(other).startswith("the model is the demo's, which draws 64 px pictures of a small world")
    assert demo_note(configured("s3://bucket/manifests/demo.parquet"))
    assert verdict({"clip_i": 0.8, "clip_i_initializer": 0.5}, other.gate) == ""
    assert demo_note(own) == ""
    assert own.gate == RunConfig().gate
    assert demo_note(configured("photos/my-dog", "--model", "owner/name")) == ""
    given = configured("photos/my-dog", "--set", "gate.min_clip_i=0.6").gate
    assert verdict({"clip_i": 0.5}, given) == "below"


def test_the_demo_clip_scores_the_demo_model_only() -> None:
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
        (["m.parquet", "--config", "nope.toml"], "nope.toml: No such file or directory"),
        (["m.parquet", "--config", "nope"], "no such file, and the recipes are"),
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
    assert lines[-2].startswith("estimate: no earlier run to estimate from")
    assert "row 2 (b): category 'thing'" in lines[0]
    assert "row 3 (c): photo " in lines[1]
    assert not output.exists()


@pytest.mark.parametrize("command", [["--dry-run"], []], ids=["dry", "real"])
def test_an_encoder_of_another_model_is_refused_before_anything_begins(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    settings = ["--model", str(tiny_model), "--set", f"extractor={ROOT / 'demo/clip'}", "--config", "encoder-fast"]
    arguments = [str(write_manifest(tmp_path, ["a"])), "--output", str(tmp_path / "out"), *settings]
    assert main([*arguments, *command]) == USAGE
    assert "encoder.safetensors': the encoder was trained for another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("concepts/*"))


@pytest.mark.parametrize("command", [["--dry-run"], []], ids=["dry", "real"])
def test_gradients_that_the_model_does_not_have_are_refused_before_anything_begins(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    flow = tiny_stable_diffusion_3(tmp_path / "flow", t5=False)
    manifest = write_manifest(tmp_path, ["a"])
    up_path = "inversion.gradient_path=up_path"

    def outcome(model: Path, *settings: str) -> tuple[int, str]:
        changes = [word for setting in settings for word in ("--set", setting)]
        arguments = [str(manifest), "--model", str(model), "--output", str(tmp_path / "out"), *changes]
        return main([*arguments, *command]), capsys.readouterr().err

    code, said = outcome(flow, up_path)
    assert code == USAGE
    assert NO_UP_PATH in said
    code, said = outcome(flow, f'gate.ladder=["{up_path}"]')
    assert code == USAGE
    assert f"gate.ladder: '{up_path}': {NO_UP_PATH}" in said
    assert not (tmp_path / "out" / "concepts").exists()
    if command:
        assert outcome(tiny_model, up_path)[0] == outcome(flow)[0] == OK


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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OverflowError("Python int too large"), FAILED, "FAILED report: not written: bug in this software"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            STOPPED,
            "FAILED report: not written: No space left on device; the disk is full",
        ),
    ],
)
def test_an_error_of_the_report_is_a_problem_of_the_run_and_nothing_is_pruned(
    error: Exception, code: int, line: str,
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    manifest = write_manifest(tmp_path, ["a"])
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    old = tmp_path / "out" / "concepts" / "old" / "f" / "record.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    monkeypatch.setattr(stages, "build_report", fail)
    command = [str(manifest), "--config", str(job), "--output", str(tmp_path / "out"), "--retry", "failed", "--prune"]
    assert main(command) == code
    said = capsys.readouterr().out
    assert line in said
    assert "FAILED pruning: nothing was deleted" in said
    assert old.exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["stage"] in ("ended", "stopped")


def test_a_disk_that_is_full_after_the_learning_ends_the_run_with_its_summary(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a"])
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    put = disk.put
    written: list[str] = []

    def put_once(path: Path, data: bytes) -> None:
        if path.name in written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)
        put(path, data)

    monkeypatch.setattr(disk, "put", put_once)
    command = [str(manifest), "--config", str(job), "--output", str(tmp_path / "out"), "--retry", "failed"]
    assert main([*command, "--set", "lease_s=0"]) == STOPPED
    said = capsys.readouterr()
    assert said.out.startswith("0 learned, 0 done before, 1 left out")
    assert "FAILED reporting: not written: " in said.out
    assert "the disk is full: free some space" in said.out
    assert "Traceback" not in said.err


def test_what_a_retry_rule_names_is_read_before_the_learning(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a"])
    job = tmp_path / "job.toml"
    gone = tmp_path / "gone.txt"
    rule = f"inversion.penalties.captions={gone}"
    inversion = {"adapter": {"kind": "lora"}, "penalties": {"knowledge": 0.1}}
    job.write_text(tiny_toml(tiny_model, inversion=inversion, gate={"min_clip_i": 0.5, "ladder": [rule]}))
    assert main([str(manifest), "--config", str(job), "--output", str(tmp_path / "out")]) == USAGE
    assert f"captions = '{gone}' cannot be read" in capsys.readouterr().err


def test_damage_is_named_where_it_is_not_learned_again(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a", "b"])
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    command = [str(manifest), "--config", str(job), "--output", str(tmp_path / "out")]
    config = configured(*command)
    for task in outputs.tasks_of(str(manifest), current_settings(config)).values():
        (tmp_path / "out" / task.folder.root).mkdir(parents=True)
        (tmp_path / "out" / task.folder.grid).write_bytes(b"grid")
        files = {"grid.png": StoredFile(bytes=4, sha256=hashlib.sha256(b"grid").hexdigest())}
        outputs.end(RunStore(config.output), task, files=files)
    assert main([*command, "--dry-run", "--verify"]) == OK
    (path,) = (tmp_path / "out" / "concepts" / "b").rglob("grid.png")
    path.write_bytes(b"dirg")
    assert main([*command, "--dry-run"]) == OK
    assert "2 done, 0 to do" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--verify"]) == FAILED
    said = capsys.readouterr().out
    assert "b: damaged: concepts/b/" in said
    assert "1 done, 1 to do" in said
    path.write_bytes(b"")
    assert main([*command, "--only", "a"]) == FAILED
    assert "FAILED b: damaged: concepts/b/" in capsys.readouterr().out


def test_a_bad_row_is_tolerated_and_then_known(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["b"], category=["thing"])
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    monkeypatch.setattr(stages, "connect", lambda _: pytest.fail("a cluster was asked for"))
    command = [str(manifest), "--config", str(job), "--output", str(tmp_path / "out"), "--tolerate"]
    assert main([*command, "0"]) == FAILED
    assert "not tolerated: 1 new failures; tolerance.failures = 0 allows 0\n" in capsys.readouterr().out
    assert main([*command, "0"]) == FAILED  # a failed run makes nothing known
    assert main([*command, "1"]) == TOLERATED
    assert main([*command, "0"]) == TOLERATED
    assert capsys.readouterr().out.endswith(
        "WARNING tolerated: 0 new failures, 1 known; tolerance.failures = 0 allows 0\n"
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["exit_code"] == TOLERATED
    assert main([*command, "0", "--set", "tolerance.exit_code=0"]) == OK
