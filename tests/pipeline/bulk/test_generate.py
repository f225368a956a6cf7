"""Counts of bulk pictures, with a stand-in for the stage that draws them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk import generate
from pipeline.bulk.generate import METADATA, PLAN, ImageCounts, generate_images
from pipeline.bulk.picture_rows import RESULT_SCHEMA
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.parquet import read_tables
from pipeline.store.storage import RunStore

PROMPTS = [Prompt("a photo of {}"), Prompt("a drawing of {}"), Prompt("a photo of {}")]


def test_pictures_are_counted_by_how_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(manifest="m.parquet", output=str(tmp_path), extractor="", device="cpu")
    records = [
        ConceptRecord(concept_id=name, fingerprint=name * 32, status="done", placeholder_token=f"<{name}>")
        for name in "abc"
    ]
    failing = {"a drawing of <b>": "too long", "a photo of <c>": "too dark"}
    drawn: list[list[str]] = []

    def draw(config: RunConfig, num_rows: int, _: Any) -> None:
        rows = read_tables(tmp_path / PLAN).to_pylist()
        assert len(rows) == num_rows
        drawn.append([row["prompt"] for row in rows])
        results = [
            row | {"status": "failed" if row["prompt"] in failing else "ok", "error": failing.get(row["prompt"])}
            for row in rows
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(results, RESULT_SCHEMA), buffer)
        RunStore(config.output).put(f"{METADATA}/{len(drawn)}.parquet", buffer.getvalue())

    monkeypatch.setattr(generate, "draw_plan", draw)

    def count() -> ImageCounts:
        return generate_images(config, records, PROMPTS, fleet=None)  # type: ignore[arg-type]  # nothing is drawn

    assert count() == ImageCounts(done_before=0, drawn=4, failed=2, first_errors=("too long", "too dark"))
    del failing["a photo of <c>"]
    assert count() == ImageCounts(done_before=4, drawn=1, failed=1, first_errors=("too long",))
    failing.clear()
    assert count() == ImageCounts(done_before=5, drawn=1, failed=0)
    assert count() == ImageCounts(done_before=6, drawn=0, failed=0)
    assert drawn[1:] == [["a drawing of <b>", "a photo of <c>"], ["a drawing of <b>"]]
