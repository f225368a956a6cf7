"""A worker killed at work, a run stopped from outside: nothing lost, nothing done twice, the same bytes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.actor.learner import Learner
from pipeline.exit_codes import OK, STOPPED
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import from_json
from pipeline.run import main
from tests.faults.held import LEARNER, HeldActor, hold_of
from tests.faults.processes import descendants, kill
from tests.pipeline.runs import tiny_config, tiny_toml, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 80
SETTINGS = {"inversion": {"steps": STEPS}, "actors": {"count": 1, "slots": 2, "checkpoint_steps": 5}}


@pytest.fixture(scope="module")
def run_files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A manifest of three concepts and its job.toml."""
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "job.toml"
    config.write_text(tiny_toml(tiny_model, **SETTINGS))
    return write_manifest(folder, ["a", "b", "c"]), config


@pytest.fixture(scope="module")
def calm(run_files: tuple[Path, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each concept's curve is when nothing happens: learned alone, in this process, without checkpoints."""
    output = tmp_path_factory.mktemp("calm")
    settings = SETTINGS | {"actors": SETTINGS["actors"] | {"checkpoint_steps": 0}}
    learner = Learner(tiny_config(tiny_model, output, **settings))
    rows = [row for row in read_manifest(str(run_files[0])) if isinstance(row, ManifestRow)]

    async def learn() -> None:
        for row in rows:
            record = await learner.learn(ConceptTask(concept=row.concept, fingerprint="calm"))
            assert record.status == "done"

    asyncio.run(learn())
    learner.close()
    return contents(output)


def contents(output: Path) -> dict[str, bytes]:
    """Concept's file -> bytes, for those that hold only what was learned and drawn."""
    paths = [path for name in ("curve.parquet", "grid.png") for path in (output / "concepts").rglob(name)]
    return {f"{path.parts[-3]}/{path.name}": path.read_bytes() for path in paths}


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output whose actors learn no further than to the first checkpoint while they are held."""
    monkeypatch.setattr(cluster, "ModelActor", HeldActor)
    hold_of(tmp_path / "out").write_text("0")
    return tmp_path / "out"


def when_checkpointed(output: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something when a concept is some way through, and let it go on only then."""

    def watch() -> None:
        while not list(output.glob("concepts/*/*/checkpoint.safetensors")):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_killed_worker_loses_nothing(run_files: tuple[Path, Path], calm: dict[str, bytes], output: Path) -> None:
    manifest, config = run_files

    def kill_learner() -> None:
        (pid,) = descendants(LEARNER)
        kill(pid)
        hold_of(output).unlink()

    killer = when_checkpointed(output, kill_learner)
    assert main([str(manifest), "--config", str(config), "--output", str(output)]) == OK
    assert not killer.is_alive()
    records = [from_json(path.read_bytes()) for path in output.glob("concepts/*/*/record.json")]
    assert sorted(record.concept_id for record in records) == ["a", "b", "c"]
    assert max(record.attempts for record in records) == 2
    assert contents(output) == calm


def test_a_stopped_run_continues(
    run_files: tuple[Path, Path], calm: dict[str, bytes], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, config = run_files
    command = [str(manifest), "--config", str(config), "--output", str(output)]
    when_checkpointed(output, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command) == STOPPED
    assert "run the same command again" in capsys.readouterr().out
    assert list(output.glob("concepts/*/*/checkpoint.safetensors"))
    assert len(contents(output)) < len(calm)

    assert main(command) == OK
    assert contents(output) == calm
    assert not list(output.glob("concepts/*/*/checkpoint.safetensors"))
