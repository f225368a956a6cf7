"""The training of an encoder as a command, on a real Ray: stopped, its worker or its driver killed, and resumed, it
writes the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load

from pipeline import train_encoder
from pipeline.encoder_training import workers
from pipeline.exit_codes import FAILED, OK, STOPPED
from pipeline.ledger.encoder_record import CHECKPOINT, ENCODER, read_record
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.faults.held import hold_of, train_held
from tests.faults.processes import descendants, kill
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import tiny_extractor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # each starts Ray Train several times

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
WORKER = "ray::RayTrainWorker"
ENCODER_SETTINGS = {
    "network": {"hidden": 16, "patch_dim": 4, "grid_side": 2, "latent_side": 2},
    "training": {"steps": STEPS, "concepts_per_step": 4, "samples_per_concept": 1},
    "checkpoint_steps": 5,
    "shown": 1,
}


@contextmanager
def killing_a_worker(output: Path) -> Iterator[list[int]]:
    """Kill the training's process, which is held behind its next checkpoint; yield the list of those killed."""
    killed: list[int] = []
    checkpoint = output / CHECKPOINT
    before = written_at(checkpoint)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set() and not killed:
            if written_at(checkpoint) != before:
                killed.extend(descendants(WORKER))
                for pid in killed:
                    kill(pid)
                hold_of(output).unlink()
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        is_over.set()
        watcher.join()


def kill_the_driver(arguments: list[str], output: Path) -> None:
    """Run the command in a process of its own on the test's Ray, with a worker that is held behind the first
    checkpoint, and kill it there."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.faults.held import train; train()", *arguments]
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not written_at(output / CHECKPOINT):
        assert driver.poll() is None, driver.communicate()[0][-5000:]
        time.sleep(0.01)
    kill(driver.pid)
    driver.communicate()
    assert driver.returncode < 0


def written_at(path: Path) -> int:
    """Return a file's time of modification in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Training:
    """A training without faults, and the command for another one of the concepts that it was trained on."""

    folder: Path

    @property
    def calm(self) -> Path:
        return self.folder / "calm"

    def arguments(self, output: Path) -> list[str]:
        """Return the command's for `output`. The manifest of others than `calm` lacks the concept with a broken photo,
        for which every training starts a stage of Ray Data."""
        manifest = self.folder / ("all.parquet" if output == self.calm else "good.parquet")
        return [str(manifest), "--output", str(output), "--config", str(self.folder / "job.toml")]

    def train(self, output: Path, *options: str) -> int:
        return train_encoder.main([*self.arguments(output), *options])

    def another(self, name: str) -> Path:
        """Return an output in which the photos have been read."""
        shutil.copytree(self.calm / "examples", self.folder / name / "examples")
        return self.folder / name


@pytest.fixture(scope="module")
def training(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Training:
    request.getfixturevalue("ray_cluster")
    folder = tmp_path_factory.mktemp("training")
    manifest = write_manifest(folder, list("abcdefgh")).rename(folder / "all.parquet")
    good = [row for row in read_table(manifest).to_pylist() if row["concept_id"] != "c"]
    pq.write_table(pa.Table.from_pylist(good), folder / "good.parquet")
    (folder / "photos" / "c-1.png").write_bytes(b"no picture")
    clip = tiny_extractor("clip", folder / "clip")
    settings = tiny_toml(tiny_model, extractor=str(clip), encoder=ENCODER_SETTINGS, lease_s=0)
    (folder / "job.toml").write_text(settings)
    found = Training(folder)
    assert found.train(found.calm) == FAILED
    return found


def test_a_broken_photo_costs_its_own_concept(training: Training) -> None:
    """The record and the exit code name it."""
    calm = training.calm
    record = read_record(RunStore(str(calm)))
    assert record is not None
    assert (record.steps, record.trained + len(record.held_out)) == (STEPS, 7)
    assert list(record.left_out) == ["c"]
    assert "photos/c-1.png" in record.left_out["c"]
    assert "Left out" in (calm / "report.html").read_text()
    assert (calm / record.pictures[0]).exists()
    assert not (calm / CHECKPOINT).exists()


def test_a_training_that_is_stopped_and_loses_its_worker_writes_the_same_encoder(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    harried = training.another("harried")
    with monkeypatch.context() as patch:
        patch.setattr(train_encoder, "stopping_on_signals", stopped_at_once)
        assert training.train(harried) == STOPPED
    assert not (harried / ENCODER).exists()
    hold_of(harried).touch()
    monkeypatch.setattr(workers, "_train", train_held)
    with killing_a_worker(harried) as killed:
        assert training.train(harried, "--set", "tracking=tensorboard") == OK
    assert killed
    assert (harried / ENCODER).read_bytes() == (training.calm / ENCODER).read_bytes()
    resumed, calm = (read_record(RunStore(str(output))) for output in (harried, training.calm))
    assert resumed is not None
    assert calm is not None
    assert resumed.curve == calm.curve
    assert [step for step, _, _ in calm.curve] == [5, 10, 15, 20, 25, 30]
    logged = logged_series(harried)
    assert logged["encoder/loss"] == pytest.approx({step: loss for step, loss, _ in calm.curve})
    assert logged["encoder/held_out_loss"] == pytest.approx({step: held_out for step, _, held_out in calm.curve})
    rates = logged["encoder/learning_rate"]
    assert (rates[5], rates[STEPS]) == pytest.approx((1e-3 * 5 / 101, 1e-3 / 9))  # in the warm-up, and at the end
    written = (harried / ENCODER).stat().st_mtime_ns
    assert training.train(harried) == OK  # nothing to do
    assert (harried / ENCODER).stat().st_mtime_ns == written


def test_two_workers_learn_what_one_learns_from_twice_the_batch(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: each takes half of every step's concepts, and one of them has no held-out concept to measure."""
    numbers: list[int] = []

    def counted(*arguments: Any, scaling_config: ScalingConfig, **options: Any) -> TorchTrainer:
        numbers.append(scaling_config.num_workers)
        return TorchTrainer(*arguments, scaling_config=scaling_config, **options)

    monkeypatch.setattr(workers, "TorchTrainer", counted)
    both = training.another("both")
    assert training.train(both, "--set", "encoder.workers=2") == OK
    assert numbers == [2]
    ours, calm = (read_record(RunStore(str(output))) for output in (both, training.calm))
    assert ours is not None
    assert calm is not None
    torch.testing.assert_close(torch.tensor(ours.curve), torch.tensor(calm.curve))
    stored, known = (load((output / ENCODER).read_bytes()) for output in (both, training.calm))
    integers = {name for name, tensor in known.items() if tensor.dtype == torch.int8}
    assert 0 < len(integers) < len(known) == len(stored)
    for names, atol in ((integers, 1.0), (known.keys() - integers, 1e-4)):  # an integer may be rounded up or down
        torch.testing.assert_close(
            {name: stored[name].float() for name in names},
            {name: known[name].float() for name in names},
            rtol=1e-2,
            atol=atol,
        )


def test_a_training_whose_driver_is_killed_writes_the_same_encoder(training: Training) -> None:
    orphaned = training.another("orphaned")
    hold_of(orphaned).touch()
    kill_the_driver(training.arguments(orphaned), orphaned)
    assert read_record(RunStore(str(orphaned))) is None
    assert training.train(orphaned) == OK
    assert (orphaned / ENCODER).read_bytes() == (training.calm / ENCODER).read_bytes()


def logged_series(output: Path) -> dict[str, dict[int, float]]:
    """Return the series (name -> step -> value) that a training logged to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output / "tracking").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]}


@contextmanager
def stopped_at_once() -> Iterator[threading.Event]:
    """As `stopping_on_signals` with a signal that comes before the first step."""
    stop = threading.Event()
    stop.set()
    yield stop
