"""The table of the learned rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.ledger.vectors import PATH, write_vectors
from pipeline.report_config import VectorType
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.ledger.test_results import make

ONE = np.array([[0.5, -1.25], [2.0, 3.0]], np.float32)
SEVERAL = {"clip_l": ONE[:1], "clip_g": np.array([[1.0, 2.0, 3.0]], np.float32)}


@pytest.mark.parametrize("number_type", ["float16", "float32"])
def test_each_vector_is_a_row(number_type: VectorType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = RunStore(str(tmp_path))
    a, b, failed, cut, gone = make("a"), make("b"), make("c", status="failed"), make("d"), make("e")
    store.put(a.result.embedding, save({"<a>": ONE}, {"text_encoder": "clip_l"}))
    store.put(b.result.embedding, save(SEVERAL, {"text_encoders": "clip_l, clip_g"}))
    store.put(cut.result.embedding, save({"<d>": ONE})[:40])
    assert write_vectors(store, [a, b, failed, cut, gone], number_type) == 4
    table = read_table(io.BytesIO(store.get(PATH)))
    types = {"float16": "halffloat", "float32": "float"}
    assert str(table.schema.field("vector").type.value_type) == types[number_type]
    rows = json.loads(json.dumps(table.drop_columns(["fingerprint"]).to_pylist()))
    assert [list(row.values()) for row in rows] == [
        ["a", "clip_l", 0, [0.5, -1.25]],
        ["a", "clip_l", 1, [2.0, 3.0]],
        ["b", "clip_g", 0, [1.0, 2.0, 3.0]],
        ["b", "clip_l", 0, [0.5, -1.25]],
    ]
    assert table["fingerprint"].to_pylist() == ["0" * 32] * 4
    assert "no vectors of d" in caplog.text
    assert "no vectors of e" in caplog.text
