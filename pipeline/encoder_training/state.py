"""Progress of a training between two steps, and the checkpoint that holds it."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.ledger.encoder_record import CHECKPOINT, CURVE
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)

_CURVE_SCHEMA = pa.schema([("step", pa.int64()), ("loss", pa.float64()), ("held_out", pa.float64())])


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of the learning curve: what a checkpoint saw."""

    step: int
    """Steps taken."""
    loss: float
    """Mean training loss since the point before."""
    held_out: float
    """Mean loss on the held-out concepts, with the same noise at every point."""


@dataclass(slots=True)
class TrainingState:
    """State that a resumed training needs besides the trainer's own."""

    step: int = 0
    """Steps taken."""
    curve: list[CurvePoint] = field(default_factory=list)
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last point of the curve."""
    loss_steps: int = 0
    """Number of those steps."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Concept id -> the reason why training left it out of a step."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the encoder at the lowest held-out loss so far, on the CPU; with the first worker alone."""

    @property
    def best_point(self) -> CurvePoint | None:
        """The point with the lowest held-out loss, the first of equal ones; None before the first point."""
        return min(self.curve, key=lambda point: point.held_out, default=None)

    def points_since_best(self) -> int:
        """Return the number of points after the best one."""
        best = self.best_point
        return 0 if best is None else sum(point.step > best.step for point in self.curve)

    def add_point(self, loss: float, held_out: float) -> bool:
        """Add a point at the present step; return whether it is the best. A loss that is not finite is never best."""
        before = self.best_point
        held_out = held_out if math.isfinite(held_out) else math.inf
        self.curve.append(CurvePoint(self.step, loss, held_out))
        return before is None or held_out < before.held_out

    def without_weights(self) -> TrainingState:
        """Return a copy that is small and that later steps do not change."""
        return dataclasses.replace(self, best={}, curve=list(self.curve), left_out=dict(self.left_out))


def save_checkpoint(store: RunStore, state: TrainingState, trainer: Mapping[str, Any], fingerprint: str) -> None:
    """Put the checkpoint in the place of the former one. `trainer`: tensors and plain values."""
    values = {each.name: getattr(state, each.name) for each in dataclasses.fields(state)}
    values["curve"] = [dataclasses.astuple(point) for point in state.curve]
    buffer = io.BytesIO()
    torch.save({"fingerprint": fingerprint, "state": values, "trainer": trainer}, buffer)
    store.put(CHECKPOINT, buffer.getvalue())


def save_curve(store: RunStore, curve: Sequence[CurvePoint]) -> None:
    """Put the curve as Parquet in the place of the former one."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(point) for point in curve], _CURVE_SCHEMA), buffer)
    store.put(CURVE, buffer.getvalue())


def load_checkpoint(store: RunStore, fingerprint: str) -> tuple[TrainingState, dict[str, Any]]:
    """Return the state of the checkpoint and the trainer's, or a new state and nothing.

    A checkpoint that is damaged, or that has another fingerprint because settings or concepts have changed, does not
    count.
    """
    try:
        data = store.get(CHECKPOINT)
    except FileNotFoundError:
        return TrainingState(), {}
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        values = found["state"] | {"curve": [CurvePoint(*point) for point in found["state"]["curve"]]}
        state = TrainingState(**values)
        is_same = found["fingerprint"] == fingerprint
        trainer: dict[str, Any] = found["trainer"]
    except Exception as error:  # on damaged files torch raises nearly everything
        log.warning("training starts anew: %s is damaged: %s", store.uri(CHECKPOINT), error)
        return TrainingState(), {}
    if not is_same:
        log.warning("training starts anew: %s is of other settings or concepts", store.uri(CHECKPOINT))
        return TrainingState(), {}
    return state, trainer
