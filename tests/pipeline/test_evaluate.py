"""The evaluation's command without a cluster: its settings, and what it refuses before any work."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path

import pytest

from pipeline.config_file import to_tree
from pipeline.evaluate import main, mean_and_error, parse, prepare
from pipeline.exit_codes import OK, USAGE
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, tiny_toml, write_manifest


def test_a_finished_run_brings_its_own_settings(tmp_path: Path) -> None:
    made = tiny_config("demo/model", tmp_path / "elsewhere", seed=7, extractor="owner/clip")
    RunStore(str(tmp_path / "out")).put("run.json", json.dumps({"config": to_tree(made)}).encode())
    command = [str(tmp_path / "out"), "--protocol", "paper", "--dino", "owner/dino"]
    config, code = prepare(parse(command))
    assert (config.seed, config.extractor, config.inversion.steps) == (7, "owner/clip", made.inversion.steps)
    assert (config.evaluation.protocol, config.evaluation.dino) == ("paper", "owner/dino")
    assert (config.output, code) == (str(tmp_path / "out"), OK)


def test_what_cannot_be_evaluated_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml("demo/model"))
    manifest, output = write_manifest(tmp_path, ["a"]), tmp_path / "out"
    command = [str(manifest), "--config", str(job), "--output", str(output)]
    assert main(command) == USAGE
    assert "no feature extractor: name a CLIP or SigLIP" in capsys.readouterr().err
    assert main([*command, "--protocol", "slow"]) == USAGE
    assert "evaluation.protocol" in capsys.readouterr().err
    assert main([*command, "--set", "extractor=demo/clip", "--prompts", str(tmp_path / "none.txt")]) == USAGE
    assert "none.txt cannot be read" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for bad, said in (
        (str(tmp_path / "empty"), "is no feature extractor: no config.json there"),
        (str(tmp_path / "gone" / "dino"), "is neither a directory here nor a hub id"),
    ):
        assert main([*command, "--set", "extractor=demo/clip", "--dino", bad]) == USAGE
        error = capsys.readouterr().err
        assert f"evaluation.dino = '{bad}'" in error
        assert said in error
    assert main([str(tmp_path / "nothing.parquet"), "--output", str(output)]) == USAGE
    assert "no manifest at" in capsys.readouterr().err
    assert not output.exists()


def test_mean_and_standard_error_as_text() -> None:
    assert mean_and_error([0.7, nan, 0.9]) == "0.800 \u00b1 0.100"
    assert mean_and_error([0.7]) == "0.700"
    assert mean_and_error([nan]) == "-"
