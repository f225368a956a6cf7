"""Training on Ray Train: start the workers, follow them from the driver, and stop them with a checkpoint."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer, get_device, prepare_model

from pipeline.actor.model_loading import load_model
from pipeline.cluster import watch_for_notice
from pipeline.config import RunConfig
from pipeline.encoder_training.blocks import ExampleBlocks
from pipeline.encoder_training.loop import Ending, Notices, Team, TrainingLoop
from pipeline.encoder_training.publish import Published, new_network, publish
from pipeline.encoder_training.schedule import Split
from pipeline.encoder_training.state import TrainingState
from pipeline.report.logs import configure_logs
from pipeline.report.progress import Progress
from pipeline.store.errors import RunAborted, describe_error
from pipeline.store.storage import RunStore
from textual_inversion.encoder_training import EncoderTrainer

_ASK_EVERY_S = 1.0
"""Time between two questions of the first worker whether to stop, and of the driver how far it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """Job of a worker."""

    config: RunConfig
    fingerprint: str
    split: Split
    examples: ExampleBlocks
    start: bytes = b""
    """File of the encoder to start from; empty starts at random."""


@dataclass(frozen=True, slots=True)
class News:
    """Message of the first worker to the driver."""

    state: TrainingState = field(default_factory=TrainingState)
    """Progress of the training, without weights."""
    ending: Ending | None = None
    published: Published | None = None


class Mailbox:
    """Carries news from the first worker to the driver, and the wish to stop the other way."""

    def __init__(self) -> None:
        self._is_stopping = False
        self._news = News()

    def tell(self, news: News) -> bool:
        """Take the news; return whether to stop."""
        self._news = news
        return self._is_stopping

    def news(self) -> News:
        return self._news

    def stop(self) -> None:
        self._is_stopping = True


def train_on_workers(
    job: TrainingJob,
    gpus: float,
    stop: threading.Event,
    watch: Callable[[TrainingState], None] = lambda _state: None,
) -> News:
    """Train and publish; return the last news of the first worker.

    `gpus` is the cluster's number; with 0 the workers train on CPUs. `watch` is called with how far the training is,
    about once a second and at the end. When `stop` is set, the workers save a checkpoint and end. Raises RunAborted if
    training failed more often than `encoder.max_failures`, and ValueError for a number of workers that does not divide
    the concepts of a step.
    """
    config = job.config
    num_workers = count_workers(config, gpus)
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    resources = {"CPU": config.actors.cpus} | ({"GPU": 1} if gpus else {})
    # Ray Train wants a folder, and finds nothing to keep in it: checkpoints go to the output.
    with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            _train,
            train_loop_config={"job": job, "mailbox": mailbox},
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, use_gpu=bool(gpus), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name="encoder",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.encoder.max_failures),
            ),
        )
        failure = _follow(trainer.fit, mailbox, config, stop, watch)
    if failure is not None:
        raise RunAborted(f"the encoder's training failed: {describe_error(_cause_of(failure))}") from failure
    last: News = ray.get(mailbox.news.remote())
    return last


def count_workers(config: RunConfig, gpus: float) -> int:
    """Return the number of training processes: as configured, or one for every GPU, or one.

    Raises ValueError unless it divides the concepts of a step: unequal parts would not be learned from as one.
    """
    num_workers = config.encoder.workers or int(gpus) or 1
    size = config.encoder.training.concepts_per_step
    if size % num_workers:
        raise ValueError(
            f"encoder.training.concepts_per_step = {size}: must be a multiple of the number of workers, here "
            f"{num_workers}, one for every GPU; change it, or set encoder.workers to a divisor of it"
        )
    return num_workers


def _cause_of(failure: BaseException) -> BaseException:
    """Return what Ray Train's error was raised for: the error of the first worker that has one, or the controller's.

    The text of Ray Train's own begins with a line that names neither.
    """
    cause = failure
    if isinstance(failure, ray.train.WorkerGroupError) and failure.worker_failures:
        cause = failure.worker_failures[min(failure.worker_failures)]
    elif isinstance(failure, ray.train.ControllerError):
        cause = failure.controller_failure
    return cause


def _follow(
    fit: Callable[[], object],
    mailbox: Any,
    config: RunConfig,
    stop: threading.Event,
    watch: Callable[[TrainingState], None],
) -> BaseException | None:
    """Call `fit` in a thread, so that signals reach this one; tell how far it is, and pass the wish to stop on.

    Return what `fit` raised, or None. Workers that do not save within `actors.drain_s` after a stop are left behind.
    """
    failures: list[BaseException] = []

    def call() -> None:
        try:
            fit()
        except BaseException as error:
            failures.append(error)

    progress = Progress("training", lambda: config.encoder.training.steps, log_format=config.log_format)
    thread = threading.Thread(target=call, name="ray-train", daemon=True)
    thread.start()
    give_up = float("inf")
    while thread.is_alive() and time.monotonic() < give_up:
        thread.join(_ASK_EVERY_S)
        if stop.is_set() and give_up == float("inf"):
            mailbox.stop.remote()
            give_up = time.monotonic() + config.actors.drain_s
        state = ray.get(mailbox.news.remote()).state
        watch(state)
        progress.update(done=state.step, running=_describe(state), final=not thread.is_alive())
    return failures[0] if failures else None


def _describe(state: TrainingState) -> str:
    return f"held-out loss {state.curve[-1].held_out:.4f}" if state.curve else ""


def _train(settings: Mapping[str, Any]) -> None:
    """Train in one worker process; the first worker publishes the encoder."""
    job: TrainingJob = settings["job"]
    context = ray.train.get_context()
    team = Team(rank=context.get_world_rank(), num_workers=context.get_world_size(), device=get_device())
    config = job.config
    configure_logs(config.log_format, logging.WARNING)
    notices = Notices()
    watch_for_notice(notices.leave.set)

    backbone = load_model(config)
    network = new_network(config, backbone, job.start)
    trainer = EncoderTrainer(
        prepare_model(network, parallel_strategy_kwargs={"broadcast_buffers": False}),
        backbone,
        config.encoder.training,
        seed=config.seed,
    )
    store = RunStore(config.output)
    loop = TrainingLoop(
        trainer=trainer,
        read=job.examples.read,
        split=job.split,
        config=config.encoder,
        seed=config.seed,
        store=store,
        fingerprint=job.fingerprint,
        team=team,
        notices=notices,
        report=_report_to_ray,
    )
    if team.rank > 0:
        loop.run()
        return
    mailbox = settings["mailbox"]
    with _telling(mailbox, loop, notices.stop):
        ending = loop.run()
    published = publish(loop, backbone, config) if ending != "stopped" else None
    ray.get(mailbox.tell.remote(News(loop.state.without_weights(), ending, published)))


def _report_to_ray(state: TrainingState) -> None:
    """Give Ray Train the newest point of the curve, for its dashboard and metrics."""
    point = state.curve[-1]
    ray.train.report({"step": point.step, "loss": point.loss, "held_out": point.held_out})


@contextmanager
def _telling(mailbox: Any, loop: TrainingLoop, stop: threading.Event) -> Iterator[None]:
    """Tell the driver how far the loop is while the block runs, and set `stop` when the driver wishes it."""
    is_over = threading.Event()

    def tell() -> None:
        while True:
            if ray.get(mailbox.tell.remote(News(loop.state.without_weights()))):
                stop.set()
            if is_over.wait(_ASK_EVERY_S):
                return

    teller = threading.Thread(target=tell, name="news", daemon=True)
    teller.start()
    try:
        yield
    finally:
        is_over.set()
        teller.join()
