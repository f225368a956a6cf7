"""The command that trains an encoder, without a cluster: its settings, and what it refuses before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.exit_codes import USAGE
from pipeline.inputs.models import extractor_hash
from pipeline.train_encoder import Training, configure, main, parse, read_start
from tests.pipeline.runs import write_manifest
from tests.textual_inversion.test_encoder import CONFIG, FEATURES
from tests.tiny_models import tiny_extractor
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.toy_backbone import ToyBackbone
from textual_inversion.encoder import ConceptEncoder
from textual_inversion.encoder_file import Doubt, TrainedEncoder, dump_encoder


def test_options_are_settings_with_absolute_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["catalog.parquet", "--output", "out", "--from-run", "night", "--init-from", "s3://bucket/encoder"]
    config = configure(parse([*options, "--set", "encoder.training.steps=5"]))
    assert (config.manifest, config.output) == (str(tmp_path / "catalog.parquet"), str(tmp_path / "out"))
    assert (config.encoder.from_run, config.encoder.init_from) == (str(tmp_path / "night"), "s3://bucket/encoder")
    assert config.encoder.training.steps == 5
    assert configure(parse(["--output", "out", "--from-run", "night"])).manifest == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--output", "out"], "nothing to train on: name a manifest, or an earlier run's output with --from-run"),
        (["m.parquet"], "no output: name a folder or URI with --output"),
        (["m.parquet", "--output", "out", "--set", "extractor="], "an encoder reads the features of a CLIP"),
        (["m.parquet", "--output", "out", "--init-from", "out"], "must be another training's output"),
        (["m.parquet", "--output", "out", "--init-from", "out/encoder.safetensors"], "must be another training's"),
        (["m.parquet", "--output", "out", "--set", "encoder.training.step=3"], "did you mean encoder.training.steps"),
        (["m.parquet", "--output", "out", "--set", "encoder.workers=3"], "a divisor of encoder.training.concepts_per"),
        (["none.parquet", "--output", "out"], "no manifest at"),
        (["m.parquet", "--output", "out", "--init-from", "nowhere"], "nowhere/encoder.safetensors' cannot be read"),
        (["--output", "out", "--from-run", "nowhere"], "must be the output of a run"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path, ["a", "b"]).rename(tmp_path / "m.parquet")
    monkeypatch.chdir(tmp_path)
    assert main(options) == USAGE
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out" / "examples").exists()


def test_a_tracker_whose_client_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest)
    )
    options = [str(write_manifest(tmp_path, ["a", "b"])), "--output", str(tmp_path / "out")]
    assert main([*options, "--set", "tracking=mlflow"]) == USAGE
    assert "tracking = 'mlflow': the package mlflow is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "examples").exists()


def test_features_that_the_denoiser_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["a", "b"])
    extractor = tiny_extractor("clip", tmp_path / "clip")
    flow = tiny_stable_diffusion_3(tmp_path / "flow", t5=False)
    options = [str(manifest), "--output", str(tmp_path / "out"), "--model", str(flow)]
    settings = [f"extractor={extractor}", "encoder.network.denoiser_side=2"]
    assert main([*options, *(word for each in settings for word in ("--set", each))]) == USAGE
    assert "encoder.network.denoiser_side is over 0, but this model's denoiser is no U-Net" in capsys.readouterr().err
    assert not (tmp_path / "out" / "examples").exists()


def test_an_encoder_of_another_model_is_no_start(tmp_path: Path) -> None:
    backbone = ToyBackbone()
    torch.manual_seed(0)
    encoder = TrainedEncoder(
        network=ConceptEncoder(CONFIG, FEATURES.sizes(), backbone),
        doubt=Doubt(mean=torch.zeros(3), whitening=torch.eye(3), max_distance=1.0),
        model_hash=backbone.model_hash(),
        extractor_hash=extractor_hash("demo/clip"),
        categories=("object",),
    )
    (tmp_path / "encoder.safetensors").write_bytes(dump_encoder(encoder))
    config = configure(parse(["m.parquet", "--output", "out", "--init-from", str(tmp_path)]))
    with pytest.raises(ValueError, match=r"encoder\.init_from = .*the encoder was trained for another model \(digest"):
        read_start(config)


def test_another_adapter_or_weight_of_learned_rows_is_another_training() -> None:
    """Without adapters and learned rows the settings are those of releases that had none."""

    def settings(*changes: str) -> dict[str, Any]:
        options = [word for change in changes for word in ("--set", change)]
        return Training(configure(parse(["m.parquet", "--output", "out", *options]))).settings

    kind = "encoder.adapter.kind=causal"
    assert "adapter" not in settings()
    assert settings(kind)["adapter"] != settings(kind, "encoder.adapter.rank=1")["adapter"]
    assert settings(kind)["examples"] == settings()["examples"], "no photo is read again"
    weight = "encoder.training.row_weight=0.1"
    assert "row_weight" not in settings()["training"]
    assert settings(weight)["training"]["row_weight"] == 0.1
    assert settings(weight)["examples"] == settings()["examples"], "no photo without learned rows is read again"
