"""The judges from outside: they tell the demo's concepts apart, and the table says what was drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ImageChops, ImageFilter

from demo.perceptual import compare, efficientnet, shift_tolerant_lpips
from pipeline.ledger.records import put_record
from pipeline.store.storage import RunStore
from tests.pipeline.actor.test_library import record
from textual_inversion.photos import open_photo

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("stlpips_pytorch")
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
    table = compare(
        a_run(tmp_path, {"tiger": "tiger", "taxi": "taxi", "tomato": "taxi"}), efficientnet(), shift_tolerant_lpips()
    )
    found = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines()[2:])
    assert "2 of 2" in found["tiger"]
    assert "2 of 2" in found["taxi"]
    assert "0 of 2" in found["tomato"]
    among, own, others = map(float, found["tiger"].split(" | ")[:3])
    assert among > 0.8
    assert own > others + 0.2
    among, own, others = map(float, found["tiger"].split(" | ")[4:])
    assert max(among, own) < 0.6 * others


def test_distances_are_those_of_the_package() -> None:
    """The figures are of the package's own forward pass, run with stand-ins for the modules it only imports."""
    tiger, taxi, koala = (open_photo((IMAGES / name / "0.png").read_bytes()) for name in ("tiger", "taxi", "koala"))
    found = shift_tolerant_lpips()([tiger, taxi], [tiger, taxi, koala])
    assert found.tolist() == [
        pytest.approx([0, 0.2771, 0.4652], abs=1e-4),
        pytest.approx([0.2771, 0, 0.4122], abs=1e-4),
    ]


def test_more_blur_is_further_and_a_shift_is_near() -> None:
    tiger = open_photo((IMAGES / "tiger/0.png").read_bytes())
    changed = [tiger.filter(ImageFilter.GaussianBlur(radius)) for radius in (0.5, 1, 2, 4)]
    shifted = ImageChops.offset(tiger, 1, 0)
    *blurs, shift = shift_tolerant_lpips()([*changed, shifted], [tiger]).flatten().tolist()
    assert blurs == sorted(blurs)
    assert 0 < shift < blurs[0]


def test_a_run_without_pictures_is_refused(tmp_path: Path) -> None:
    root = a_run(tmp_path, {"tiger": "tiger"})
    put_record(RunStore(root), replace(record("koala"), images=(str(IMAGES / "koala/0.png"),)))
    with pytest.raises(ValueError, match="no pictures of 'koala'"):
        compare(root, efficientnet(), shift_tolerant_lpips())
