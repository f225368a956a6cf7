"""Make outputs of runs for status and explain to read, without running anything."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.config_file import to_tree
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import ConceptTask, Plan, settings_of, settings_path
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.store.storage import RunStore
from pipeline.times import now


def settings(**changes: Any) -> dict[str, Any]:
    return settings_of(RunConfig(**changes), model_hash="m" * 32)


def put_manifest(store: RunStore, rows: list[dict[str, Any]]) -> str:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    store.put("m.parquet", buffer.getvalue())
    return store.uri("m.parquet")


def make_photos(store: RunStore, *names: str) -> list[dict[str, Any]]:
    """Write two photos for each name, and return the manifest's rows."""
    rows = []
    for name in names:
        images = [f"photos/{name}-{i}.png" for i in range(2)]
        for path in images:
            store.put(path, f"bytes of {path}".encode())
        rows.append({"concept_id": name, "images": images, "initializer": "cat"})
    return rows


def put_run(store: RunStore, manifest: str, chosen: dict[str, Any], **changes: Any) -> None:
    """Write `run.json` and the settings that it names."""
    counts = {"rows": 0, "done_before": 0, "bad_rows": 0, "left_out": 0, "looked_at": 0, "problems": {}}
    counts |= changes.pop("counts", {})
    run = {
        "stage": "ended",
        "started_at": now(),
        "config": to_tree(RunConfig(manifest=manifest)),
        "settings": digest(chosen),
        "counts": counts,
    }
    store.put(settings_path(digest(chosen)), json.dumps(chosen).encode())
    store.put("run.json", json.dumps(run | changes).encode())


def tasks_of(manifest: str, chosen: dict[str, Any]) -> dict[str, ConceptTask]:
    rows = (row for row in read_manifest(manifest) if isinstance(row, ManifestRow))
    return {task.concept.concept_id: task for task in Plan(digest(chosen), set()).tasks(rows)}


def end(store: RunStore, task: ConceptTask, **values: Any) -> ConceptRecord:
    """Store a record of the task, as done unless `values` has another status."""
    defaults: dict[str, Any] = {"status": "done", "steps": 10, "seconds": 2.0, "finished_at": now()}
    record = ConceptRecord(
        concept_id=task.concept.concept_id,
        fingerprint=task.fingerprint,
        images=task.concept.images,
        placeholder_token=task.concept.placeholder_token,
        inputs=task.inputs,
        **{**defaults, **values},
    )
    put_record(store, record)
    return record
