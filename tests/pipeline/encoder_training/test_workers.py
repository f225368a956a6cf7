"""The driver's side of a training, without Ray: how many workers, how they are followed, and how they are stopped."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.encoder_training import workers
from pipeline.encoder_training.state import CurvePoint, TrainingState
from pipeline.encoder_training.workers import Mailbox, News, count_workers
from pipeline.store.errors import RunAborted


@pytest.mark.parametrize(("asked", "gpus", "found"), [(0, 0.0, 1), (0, 4.0, 4), (2, 0.0, 2), (2, 4.0, 2), (8, 1.0, 8)])
def test_one_worker_for_every_gpu_unless_asked_otherwise(asked: int, gpus: float, found: int) -> None:
    assert count_workers(load_config(overrides=[f"encoder.workers={asked}"]), gpus) == found


def test_parts_of_a_step_are_equal() -> None:
    with pytest.raises(
        ValueError, match=r"concepts_per_step = 32: must be a multiple of the number of workers, here 3"
    ):
        count_workers(RunConfig(), 3.0)


class LocalMailbox:
    """A mailbox in this process, with Ray's way to call it."""

    def __init__(self) -> None:
        mailbox = Mailbox()
        self.stopped = threading.Event()
        self.news = SimpleNamespace(remote=mailbox.news)
        self.tell = SimpleNamespace(remote=mailbox.tell)
        self.stop = SimpleNamespace(remote=lambda: (mailbox.stop(), self.stopped.set()))


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> LocalMailbox:
    monkeypatch.setattr(workers.ray, "get", lambda value: value)
    monkeypatch.setattr(workers, "_ASK_EVERY_S", 0.01)
    return LocalMailbox()


def test_the_wish_to_stop_reaches_the_workers(mailbox: LocalMailbox, capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()

    def fit() -> None:
        state = TrainingState(step=7, curve=[CurvePoint(5, 0.5, 0.25)])
        assert not mailbox.tell.remote(News(state))
        stop.set()
        mailbox.stopped.wait()
        assert mailbox.tell.remote(News(state))

    seen: list[TrainingState] = []
    assert workers._follow(fit, mailbox, RunConfig(), stop, seen.append) is None
    assert seen[-1].curve == [CurvePoint(5, 0.5, 0.25)]
    assert "training: 7/10000 done, held-out loss 0.2500" in capsys.readouterr().err


def test_workers_that_do_not_stop_are_left_behind(mailbox: LocalMailbox) -> None:
    config = RunConfig()
    stop, never = threading.Event(), threading.Event()
    stop.set()
    hasty = replace(config, actors=replace(config.actors, drain_s=0.05))
    assert workers._follow(never.wait, mailbox, hasty, stop, lambda _state: None) is None
    assert mailbox.stopped.is_set()
    never.set()


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(OSError("no room for a worker")),
        WorkerGroupError(
            "[Rank 1 Error Snippet]:\nTraceback", {1: OSError("no room for a worker"), 2: OSError("away")}
        ),
        OSError("no room for a worker"),
    ],
)
def test_what_made_a_training_fail_is_said(
    error: Exception, mailbox: LocalMailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> Any:
        raise error

    monkeypatch.setattr(workers, "TorchTrainer", lambda *_arguments, **_options: SimpleNamespace(fit=fit))
    monkeypatch.setattr(
        workers.ray, "remote", lambda **_options: lambda _class: SimpleNamespace(remote=lambda: mailbox)
    )
    job = SimpleNamespace(config=RunConfig(output=str(tmp_path)))
    with pytest.raises(RunAborted, match=r"the encoder's training failed: OSError: no room for a worker$"):
        workers.train_on_workers(job, 0.0, threading.Event())  # type: ignore[arg-type]


def test_a_failure_of_ray_train_comes_back(mailbox: LocalMailbox) -> None:
    error = RuntimeError("no worker starts")

    def fit() -> Any:
        raise error

    assert workers._follow(fit, mailbox, RunConfig(), threading.Event(), lambda _state: None) is error
