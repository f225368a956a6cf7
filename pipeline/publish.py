"""What is written of a concept: its record, its curve, its pictures as files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from pipeline.plan import ConceptTask
from pipeline.records import ConceptRecord, StoredFile, now
from pipeline.redact import redact
from pipeline.storage import RunStore


def failure_record(task: ConceptTask, error: str, attempts: int) -> ConceptRecord:
    """For a concept that cannot be learned: what was asked for and why it failed."""
    return record_of(task, "failed", attempts, error=redact(error))


def record_of(task: ConceptTask, status: Literal["done", "failed"], attempts: int, **facts: Any) -> ConceptRecord:
    """Its record, with what is to be told besides the task itself."""
    concept = task.concept
    return ConceptRecord(
        concept_id=concept.concept_id,
        fingerprint=task.fingerprint,
        status=status,
        placeholder_token=concept.placeholder_token,
        initializer=concept.initializer,
        category=concept.category,
        num_vectors=concept.num_vectors,
        images=tuple(redact(uri) for uri in concept.images),
        attempts=attempts,
        finished_at=now(),
        carried=task.carried,
        inputs=task.inputs,
        **facts,
    )


def put_files(store: RunStore, payload: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Path -> bytes, each put and made sure of; name -> what lies there now."""
    return {
        path.rpartition("/")[2]: StoredFile(bytes=len(data), sha256=store.put_checked(path, data))
        for path, data in payload.items()
    }


def curve_parquet(curve: Tensor, frozen_losses: Tensor) -> bytes:
    """[n, 3] rows of (step, loss, norm) as a Parquet file; [looks, 2] rows of (step, loss on the frozen batch), where
    anybody looked, are one column more, null at the other steps."""
    steps, losses, norms = curve.unbind(1)
    columns = {"step": steps.int().numpy(), "loss": losses.numpy(), "norm": norms.numpy()}
    if len(frozen_losses):
        looks = dict(frozen_losses.tolist())
        columns["frozen_loss"] = pa.array([looks.get(step) for step in steps.tolist()], pa.float32())
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
