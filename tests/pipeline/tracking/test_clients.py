"""Each tracker by its own client, offline: what was logged is read back. A client that is not installed is skipped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Tracking
from pipeline.tracking.clients import Tracker, check_tracking, start_tracker
from tests.pipeline.tracking.test_feed import png

SETTINGS = {"inversion.steps": "6", "grid.prompts": "a | b", "long": "x" * 2000}
LOSSES = [(1, 0.5), (2, 0.25)]


def log_two(tracker: Tracker) -> None:
    tracker.log_values(1, {"scores/clip_i": 0.75, "concepts/failed": 0})
    tracker.log_curve("a.b-c", LOSSES)
    tracker.log_grid(1, "a.b-c", png())
    tracker.log_values(2, {"scores/clip_i": 0.5, "concepts/failed": 1})
    tracker.close()


def test_tensorboard_reads_its_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_two(start_tracker("tensorboard", "night", str(tmp_path), SETTINGS))
    run = EventAccumulator(str(tmp_path / "night")).Reload()
    assert [(each.step, each.value) for each in run.Scalars("scores/clip_i")] == [(1, 0.75), (2, 0.5)]
    assert set(run.Tags()["scalars"]) == {"scores/clip_i", "concepts/failed"}, "no tag has a concept's name"
    [image] = run.Images("grid")
    assert (image.step, image.width, image.height) == (1, 40, 30)
    text = run.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| inversion.steps | 6 |" in text
    assert "a &#124; b" in text
    assert len(text) < 1000
    curve = EventAccumulator(str(tmp_path / "night" / "a.b-c")).Reload()
    assert [(each.step, each.value) for each in curve.Scalars("loss")] == LOSSES


def test_mlflow_reads_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    log_two(start_tracker("mlflow", "night", str(tmp_path), {**SETTINGS, **{f"s{n}": "v" for n in range(250)}}))
    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("textual-inversion").experiment_id])
    assert (run.info.run_name, run.info.status) == ("night", "FINISHED")
    assert run.data.params["inversion.steps"] == "6"
    assert len(run.data.params) == 253
    scores = client.get_metric_history(run.info.run_id, "scores/clip_i")
    assert [(each.step, each.value) for each in scores] == [(1, 0.75), (2, 0.5)]
    losses = client.get_metric_history(run.info.run_id, "loss/a.b-c")
    assert [(each.step, each.value) for each in losses] == LOSSES
    assert [each.path for each in client.list_artifacts(run.info.run_id, "grids")] == ["grids/00001-a.b-c.png"]


def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    check_tracking("wandb")
    log_two(start_tracker("wandb", "night", str(tmp_path), SETTINGS))
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [records] = run.glob("run-*.wandb")
    content = records.read_bytes()
    for text in (b"scores/clip_i", b"0.75", b"inversion.steps"):
        assert text in content
    assert len(list(run.glob("files/media/images/grid_*.png"))) == 1
    [table] = run.glob("files/media/table/**/*.json")
    assert json.loads(table.read_text())["data"] == [[1, "a.b-c", 0.5], [2, "a.b-c", 0.25]]


def test_wandb_asks_nobody_to_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="nobody is logged in; set WANDB_API_KEY, or WANDB_MODE=offline"):
        check_tracking("wandb")


@pytest.mark.parametrize("tracking", ["tensorboard", "wandb", "mlflow"])
def test_a_client_that_is_missing_is_named_with_its_extra(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    (tmp_path / tracking).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a folder of the name, and no package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in sys.modules else find(name))
    with pytest.raises(
        ValueError, match=rf"tracking = '{tracking}': .*pip install 'textual-inversion-ray\[{tracking}\]'"
    ):
        check_tracking(tracking)


@pytest.mark.slow
def test_the_command_says_in_one_line_which_extra_is_missing(tmp_path: Path) -> None:
    missing = next(
        (name for name in ("mlflow", "wandb", "tensorboard") if importlib.util.find_spec(name) is None), None
    )
    if missing is None:
        pytest.skip("all clients are installed")
    command = [sys.executable, "-m", "pipeline.run", "manifests/demo.parquet", "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--set", f"tracking={missing}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: tracking = '{missing}': the package {missing} is not")
    assert not (tmp_path / "out" / "run.json").exists()
