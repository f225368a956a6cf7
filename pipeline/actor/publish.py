"""Write what an actor stores of a concept: its files, and its record last."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.ledger.gate import BELOW, verdict
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, StoredFile, put_record
from pipeline.sample_config import GateConfig
from pipeline.store import retries
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import now
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.errors import ErrorKind
from textual_inversion.formats import dump_diffusers
from textual_inversion.prompts import name_in_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.actor.job import Job
    from textual_inversion.engine import Outcome


def failure_record(task: ConceptTask, error: str, attempts: int, kind: ErrorKind) -> ConceptRecord:
    """Return the record of a concept that failed: what was asked for, why it failed, and the kind of the error."""
    return record_of(task, "failed", attempts, error=redact(error), error_kind=kind)


def record_of(task: ConceptTask, status: Literal["done", "failed"], attempts: int, **facts: Any) -> ConceptRecord:
    """Return a record of the task and of the facts, which are other fields of the record."""
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


def put_files(
    store: RunStore, job: Job, outcome: Outcome, sheet: Image.Image, model: str, model_hash: str
) -> dict[str, StoredFile]:
    """Put the files of a learned concept, with their provenance, and check each; return name -> stored file.

    `sheet` is its sample grid. Deletes the record of an earlier failure. Raises OSError if the store holds other bytes.
    """
    assert outcome.embedding is not None
    assert job.start is not None
    folder = job.task.folder
    provenance = {
        "model": model,
        "model_hash": model_hash,
        "fingerprint": job.task.fingerprint,
        "start": job.start.reason,
    }
    embedding = replace(outcome.embedding, metadata={**outcome.embedding.metadata, **provenance})
    payload = {
        folder.embedding: dump_diffusers(embedding),
        folder.grid: to_png(sheet),
        folder.curve: curve_parquet(outcome.curve, outcome.eval_losses),
    }
    if embedding.adapter:
        payload[folder.adapter] = dump_adapter(embedding)
    files = {
        path.rpartition("/")[2]: StoredFile(bytes=len(data), sha256=store.put_checked(path, data))
        for path, data in payload.items()
    }
    if not job.is_new:
        store.delete(folder.failure)
    return files


def put_done(
    store: RunStore,
    job: Job,
    outcome: Outcome,
    scores: Mapping[str, float],
    files: Mapping[str, StoredFile],
    gate: GateConfig,
    **facts: Any,
) -> ConceptRecord:
    """Put the record of a learned concept, the last of its objects, and return it. `facts` are further fields of the
    record, about how its actor worked."""
    assert outcome.embedding is not None
    assert job.start is not None
    passed = verdict(scores, gate)
    if passed == BELOW and gate.ladder:  # before the record: with that, the concept counts as learned
        store.put(job.task.folder.ladder, b"{}")
    record = record_of(
        replace(job.task, concept=job.start.concept),
        "done",
        job.attempt,
        prompt_as=name_in_prompt(outcome.embedding.placeholder_token, outcome.embedding.class_noun),
        start=job.start.reason,
        steps=outcome.steps,
        seconds=outcome.seconds,
        scores=scores,
        files=files,
        gate=passed,
        setbacks=outcome.setbacks,
        repeated=retries.retry_count.take_new(),
        **facts,
    )
    put_record(store, record)
    return record


def curve_parquet(curve: Tensor, eval_losses: Tensor) -> bytes:
    """Return a concept's curve as the bytes of a Parquet file.

    `curve`: [steps, 3], rows of (step, loss, norm). `eval_losses`: [evaluations, 2], rows of (step, loss on the frozen
    batch); if there are any, they make one more column, null at all other steps.
    """
    steps, losses, norms = curve.unbind(1)
    columns = {"step": steps.int().numpy(), "loss": losses.numpy(), "norm": norms.numpy()}
    if len(eval_losses):
        evaluated = dict(eval_losses.tolist())
        columns["frozen_loss"] = pa.array([evaluated.get(step) for step in steps.tolist()], pa.float32())
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def to_png(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
