"""What resuming costs on an object store: requests, counted by the server that gets them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from pipeline.actor.publish import record_of
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.exit_codes import OK
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import Plan
from pipeline.ledger.record_parts import PartWriter, identity
from pipeline.ledger.records import to_json
from pipeline.ledger.settings import current_settings
from pipeline.report.parts import DETAILS_PER_PART, ROWS_PER_PART
from pipeline.run import main
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_toml
from tests.pipeline.s3_memory import S3Memory

pytestmark = pytest.mark.slow

CONCEPTS, PHOTOS, FILES = 10_000, 1, 2
"""A record beside so many other objects in each concept's folder, one of them the embedding."""
ON_MAP = 300
"""Concepts whose embeddings the report's map shows."""


def fill(server: S3Memory, config: RunConfig) -> None:
    """A catalog all learned, as a run that has ended leaves it."""
    ids = [f"c{i:05d}" for i in range(CONCEPTS)]
    images = [[f"photos/{name}/{j}.png" for j in range(PHOTOS)] for name in ids]
    server.objects |= {f"catalog/{uri}": uri.encode() for row in images for uri in row}
    manifest = io.BytesIO()
    pq.write_table(pa.table({"concept_id": ids, "images": images}), manifest)
    server.objects["catalog/manifest.parquet"] = manifest.getvalue()
    plan = Plan(digest(current_settings(config)), set())
    rows = np.random.default_rng(0).normal(size=(CONCEPTS, 1, 8)).astype(np.float32)
    for number, task in enumerate(
        plan.tasks(row for row in read_manifest(config.manifest) if isinstance(row, ManifestRow))
    ):
        record = dataclasses.replace(record_of(task, "done", 1, steps=100, seconds=1.0), finished_at="2026-01-02")
        folder = f"catalog/out/{task.folder.root}"
        server.objects |= {f"{folder}/file-{i}": b"x" for i in range(FILES - 1)}
        server.objects[f"catalog/out/{task.folder.embedding}"] = save({"<c>": rows[number]})
        server.objects[f"{folder}/record.json"] = to_json(record)
    store = RunStore(config.output)
    parts = PartWriter(store)
    for each in store.scan_objects("concepts"):
        if each.path.endswith("/record.json"):
            content = server.objects[f"catalog/out/{each.path}"]
            parts.add(identity(each.path, each.num_bytes, each.version), content)
    parts.flush()


def test_resuming_ten_thousand_done_concepts_costs_listings(
    s3_memory: S3Memory, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model, report={"embedded": 20, "map": ON_MAP}))
    server = s3_memory
    arguments = {"manifest": "s3://catalog/manifest.parquet", "output": "s3://catalog/out"}
    fill(server, load_config((tmp_path / "job.toml").read_text(), **arguments))
    command = [arguments["manifest"], "--output", arguments["output"], "--config", str(tmp_path / "job.toml")]
    server.requests.clear()
    assert main(command) == OK
    first = server.requests.copy()
    server.requests.clear()
    assert main(command) == OK
    assert first["get"] - server.requests["get"] == ON_MAP, "the first report reads the embeddings on its map"
    assert capsys.readouterr().out.count(f"0 learned, {CONCEPTS} done before, 0 failed") == 2
    assert json.loads(server.objects["catalog/out/run.json"])["counts"]["done_before"] == CONCEPTS
    results = 2 * (CONCEPTS * (FILES + 1) / 1000 + 1)  # pages: once for the plan, once for the report
    photos = 4 * CONCEPTS / 512  # looked up some hundred concepts at a time
    assert server.requests["list"] <= results + photos + 5
    shown = 20 * (2 + PHOTOS)  # concepts with pictures in the page: grid, curve, photos
    assert server.requests["get"] <= shown + 12
    parts = CONCEPTS / ROWS_PER_PART + CONCEPTS / DETAILS_PER_PART + 2
    assert server.requests["put"] <= parts + 12
    assert sum(server.requests.values()) < CONCEPTS / 25
