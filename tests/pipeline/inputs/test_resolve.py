from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.inputs.resolve import resolve_addresses


def test_addresses_become_absolute_and_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dino").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {
        "manifest": "sets/cats.parquet",
        "output": "s3://bucket/out/",
        "model": "demo/model",
        "extractor": "owner/clip",
        "evaluation.dino": "dino",
        "inversion.penalties.captions": "captions.txt",
        "inversion.penalties.knowledge": "0.1",
        "inversion.adapter.kind": "lora",
        "inversion.init.method": "amortised",
        "inversion.init.earlier_run": "earlier",
        "inversion.init.encoder": "encoder.safetensors",
        "inversion.init.extractor": "dino",
    }
    given = load_config(overrides=[f"{name}={value}" for name, value in settings.items()])
    config = resolve_addresses(given)
    here = os.getcwd()
    assert (config.manifest, config.output) == (f"{here}/sets/cats.parquet", "s3://bucket/out")
    assert (config.model, config.extractor) == ("demo/model", "owner/clip"), "the repository has it; a hub id"
    assert config.evaluation.dino == str(tmp_path / "dino")
    assert config.inversion.penalties.captions == f"{here}/captions.txt"
    assert config.inversion.init.earlier_run == f"{here}/earlier"
    assert config.inversion.init.encoder == f"{here}/encoder.safetensors"
    assert config.inversion.init.extractor == str(tmp_path / "dino")
    monkeypatch.chdir("/")
    assert resolve_addresses(config) == config


def test_what_is_not_given_stays_empty() -> None:
    config = resolve_addresses(load_config(overrides=["extractor="]))
    assert (config.manifest, config.extractor, config.evaluation.dino) == ("", "", "")
    with pytest.raises(ValueError, match="ssh"):
        resolve_addresses(load_config(overrides=["manifest=ssh://host/m.parquet"]))
