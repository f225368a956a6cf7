"""Trackers that a command may log to: TensorBoard, Weights & Biases and MLflow, each by its own client.

A run has few series however many concepts it has: the scores of all concepts, over the number of concepts that have
ended. Series by concept are asked for a bounded number of concepts only (`feed`). A training has its losses, over its
steps.
"""

from __future__ import annotations

import importlib.util
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.config import Tracking

_MOST_CHARACTERS = 500
"""Characters of a setting's value that are logged: the bound of older MLflow servers."""
_MOST_VALUES = 100
"""Settings in one call: MLflow's bound."""


class Tracker(Protocol):
    """A run of a tracker, begun with the run's settings."""

    def log_values(self, number: int, values: Mapping[str, float]) -> None:
        """Log one value of each of some series: at the `number`-th concept to end, or at a step of a training."""

    def log_curve(self, concept_id: str, points: Sequence[tuple[int, float]]) -> None:
        """Log a concept's loss as (step, loss)."""

    def log_grid(self, number: int, concept_id: str, png: bytes) -> None:
        """Log a concept's sample grid, a PNG file."""

    def close(self) -> None:
        """End the tracker's run, all of which is stored then."""


def check_tracking(tracking: Tracking) -> None:
    """Raise ValueError if the tracker's package is not installed, or if it would ask a person to log in."""
    if tracking == "none":
        return
    found = importlib.util.find_spec(tracking)  # each has the name of its package, and of its extra
    if found is None or found.origin is None:  # a folder of that name, as wandb makes one, is no package
        raise ValueError(
            f"tracking = {tracking!r}: the package {tracking} is not installed; install the extra "
            f"{tracking!r} of this project: pip install 'textual-inversion-ray[{tracking}]'"
        )
    if tracking == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.login(prompt=False):
            raise ValueError("tracking = 'wandb': nobody is logged in; set WANDB_API_KEY, or WANDB_MODE=offline")


def start_tracker(tracking: Tracking, name: str, folder: str, settings: Mapping[str, str]) -> Tracker:
    """Begin a run of a tracker, with a name and the run's settings.

    `folder` is one on a local disk, for trackers that write files. Raises what the tracker's client raises.
    """
    shown = {key: value[:_MOST_CHARACTERS] for key, value in settings.items()}
    if tracking == "tensorboard":
        return TensorBoard(name, folder, shown)
    if tracking == "wandb":
        return Wandb(name, folder, shown)
    return MLflow(name, shown)


class TensorBoard:
    """Event files in `<folder>/<name>`; a concept's curve is a run of its own there, so that curves share a chart."""

    def __init__(self, name: str, folder: str, settings: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(folder) / name
        self._new_writer = SummaryWriter
        self._writer = SummaryWriter(str(self._folder))
        rows = [f"| {key} | {value.replace('|', '&#124;')} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log_values(self, number: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, number)

    def log_curve(self, concept_id: str, points: Sequence[tuple[int, float]]) -> None:
        writer = self._new_writer(str(self._folder / concept_id))
        for step, loss in points:
            writer.add_scalar("loss", loss, step)
        writer.close()

    def log_grid(self, number: int, concept_id: str, png: bytes) -> None:
        self._writer.add_image("grid", np.asarray(_opened(png)), number, dataformats="HWC")
        self._writer.add_text("concept of the grid", concept_id, number)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in the project WANDB_PROJECT; WANDB_MODE=offline keeps it in `<folder>`."""

    def __init__(self, name: str, folder: str, settings: Mapping[str, str]) -> None:
        import wandb

        self._wandb: Any = wandb
        Path(folder).mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        project = os.environ.get("WANDB_PROJECT", "textual-inversion")
        place = os.environ.get("WANDB_DIR", folder)
        self._run: Any = wandb.init(project=project, name=name, dir=place, config=dict(settings), settings=quiet)
        self._run.define_metric("number")
        self._run.define_metric("*", step_metric="number")
        self._curves: dict[str, Sequence[tuple[int, float]]] = {}

    def log_values(self, number: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "number": number})

    def log_curve(self, concept_id: str, points: Sequence[tuple[int, float]]) -> None:
        self._curves[concept_id] = points

    def log_grid(self, number: int, concept_id: str, png: bytes) -> None:
        self._run.log({"grid": self._wandb.Image(_opened(png), caption=concept_id), "number": number})

    def close(self) -> None:
        if self._curves:  # one chart of all
            steps, losses = ([[point[i] for point in points] for points in self._curves.values()] for i in (0, 1))
            chart = self._wandb.plot.line_series(steps, losses, keys=list(self._curves), title="loss", xname="step")
            self._run.log({"loss": chart})
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(self, name: str, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric: Any = Metric
        self._client: Any = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "textual-inversion")
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(key, value) for key, value in settings.items()]
        for start in range(0, len(params), _MOST_VALUES):
            self._client.log_batch(self._run_id, params=params[start : start + _MOST_VALUES])

    def log_values(self, number: int, values: Mapping[str, float]) -> None:
        self._log([(key, value, number) for key, value in values.items()])

    def log_curve(self, concept_id: str, points: Sequence[tuple[int, float]]) -> None:
        self._log([(f"loss/{concept_id}", loss, step) for step, loss in points])

    def log_grid(self, number: int, concept_id: str, png: bytes) -> None:
        self._client.log_image(self._run_id, _opened(png), artifact_file=f"grids/{number:05d}-{concept_id}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _log(self, values: Sequence[tuple[str, float, int]]) -> None:
        at = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[self._metric(key, value, at, step) for key, value, step in values]
        )


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
