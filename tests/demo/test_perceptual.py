"""The judge from outside: it tells the demo's concepts apart, and the table says what was drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.perceptual import compare, efficientnet
from pipeline.records import put_record
from pipeline.storage import RunStore
from tests.pipeline.test_learned import record

pytest.importorskip("efficientnet_lite_pytorch")
IMAGES = Path(__file__).parents[2] / "demo/images"
PROMPTS = ("a photo of a {}", "a {} on a red background")


def a_run(root: Path, drawn: dict[str, str]) -> str:
    """A run in which a concept's pictures are photos of what `drawn` gives for it."""
    rows = []
    for name, shown in drawn.items():
        images = tuple(str(IMAGES / name / f"{index}.png") for index in range(5))
        put_record(RunStore(str(root)), replace(record(name), images=images))
        for index, prompt in enumerate(PROMPTS):
            path = f"images/{name}/{index}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes((IMAGES / shown / f"{index}.png").read_bytes())
            rows.append({"concept_id": name, "prompt": prompt.format(f"<{name}>"), "status": "ok", "path": path})
    (root / "images/metadata").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "images/metadata/part-0.parquet")
    return str(root)


def test_pictures_are_nearest_to_what_they_show(tmp_path: Path) -> None:
    table = compare(a_run(tmp_path, {"tiger": "tiger", "taxi": "taxi", "tomato": "taxi"}), efficientnet())
    found = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines()[2:])
    assert found["tiger"].endswith("2 of 2")
    assert found["taxi"].endswith("2 of 2")
    assert found["tomato"].endswith("0 of 2")
    among, own, others = map(float, found["tiger"].split(" | ")[:3])
    assert among > 0.8
    assert own > others + 0.2


def test_a_run_without_pictures_is_refused(tmp_path: Path) -> None:
    root = a_run(tmp_path, {"tiger": "tiger"})
    put_record(RunStore(root), replace(record("koala"), images=(str(IMAGES / "koala/0.png"),)))
    with pytest.raises(ValueError, match="no pictures of 'koala'"):
        compare(root, efficientnet())
