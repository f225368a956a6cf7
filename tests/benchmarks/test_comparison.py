"""Rows of a comparison as a table and as a plot whose labels can be read."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from benchmarks.comparison import Figure, _overlap, _place, against, plot, rows_parquet, stopping, table
from pipeline.store.parquet import read_table


def row(setup: str, concept: str, clip_i: float, clip_t: float | None, steps: int = 10) -> dict[str, Any]:
    return {"setup": setup, "concept_id": concept, "clip_i": clip_i, "clip_t": clip_t, "steps": steps, "seconds": 2.4,
            "norm": 0.5 if steps else None, "budget": 12 if steps else 0, "kept_at": steps,
            "psnr_db": 10 * clip_i, "edge_ratio": clip_t}  # fmt: skip


ROWS = [
    row("textual-inversion", "a", 0.7, 0.3), row("textual-inversion", "b", 0.9, 0.5),
    row("image-only", "a", 0.8, None, 0), row("image-only", "b", 0.8, 0.1, 0),
]  # fmt: skip


def test_mean_and_standard_error_over_concepts() -> None:
    assert Figure.of([0.7, 0.9]) == Figure(pytest.approx(0.8), pytest.approx(0.1))
    assert Figure.of([None, 0.5]) == Figure(0.5, None)
    assert Figure.of([None]) is None


def test_a_table() -> None:
    rows = [*ROWS, row("dvar", "a", 0.7, 0.3, 12) | {"kept_at": 6}, row("dvar", "b", 0.9, 0.5, 8)]
    assert table(rows, {"textual-inversion": "one vector"}) == (
        "| setup | CLIP-I | more than the default | CLIP-T | more than the default | PSNR, dB | more than the default "
        "| edges, of the photo's | more than the default | row norm | steps taken | kept at | stopped early "
        "| s per concept | concepts |  |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        "| textual-inversion | 0.800 ± 0.100 | - | 0.400 ± 0.100 | - | 8.000 ± 1.000 | - | 0.400 ± 0.100 | - "
        "| 0.500 ± 0.000 | 10 | 10 | 2 | 2 | 2 | one vector |\n"
        "| image-only | 0.800 ± 0.000 | +0.000 ± 0.100 | 0.100 | -0.400 | 8.000 ± 0.000 | +0.000 ± 1.000 "
        "| 0.100 | -0.400 | - | - | - | - | - | 2 |  |\n"
        "| dvar | 0.800 ± 0.100 | +0.000 ± 0.000 | 0.400 ± 0.100 | +0.000 ± 0.000 | 8.000 ± 1.000 | +0.000 ± 0.000 "
        "| 0.400 ± 0.100 | +0.000 ± 0.000 | 0.500 ± 0.000 | 10 (8 to 12) | 7 (6 to 8) | 1 | 2 | 2 |  |\n"
    )


def test_what_a_stop_rule_saves_and_costs() -> None:
    def pair(setup: str, steps: int, shift: float) -> list[dict[str, Any]]:
        pictures = {"a": ([0.6, 0.8], [0.1, 0.3]), "b": ([0.2, 0.4], [])}
        return [
            row(setup, concept, sum(clip_i) / 2 + shift, sum(clip_t) / 2 if clip_t else None, steps)
            | {"clip_i_pictures": [value + shift for value in clip_i], "clip_t_pictures": clip_t}
            for concept, (clip_i, clip_t) in pictures.items()
        ]

    rows = [*pair("dvar", 8, -0.1), *pair("dvar-budget", 12, 0.0), row("textual-inversion", "a", 0.7, 0.3)]
    said = stopping(rows, {"dvar": "dvar-budget", "keep-best": "textual-inversion"}).splitlines()
    assert [line for line in said if line.startswith("#")] == ["## dvar against dvar-budget, which takes all steps"]
    assert said[2:7] == [
        "| concept | steps taken | of | kept at | CLIP-I | at the full budget | difference | CLIP-T "
        "| at the full budget | difference | s | at the full budget |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| a | 8 | 12 | 8 | 0.600 | 0.700 | -0.100 ± 0.000 | 0.200 | 0.200 | +0.000 ± 0.000 | 2 | 2 |",
        "| b | 8 | 12 | 8 | 0.200 | 0.300 | -0.100 ± 0.000 | - | - | - | 2 | 2 |",
        "| all 2 | 8 | 12 | 8 | 0.400 ± 0.200 | 0.500 ± 0.200 | -0.100 ± 0.000 | 0.200 | 0.200 | +0.000 | 2 | 2 |",
    ]
    assert stopping(ROWS, {"dvar": "dvar-budget"}) == ""


def test_differences_are_taken_concept_by_concept() -> None:
    rows = [*ROWS, row("other", "a", 0.75, 0.2), row("other", "b", 0.95, 0.5), row("other", "c", 0.1, 0.1)]
    assert against(rows, "clip_i")["other"] == Figure(pytest.approx(0.05), pytest.approx(0, abs=1e-9))
    assert against(rows[2:], "clip_i")["other"] is None  # nothing to compare with


def test_rows_survive_as_parquet() -> None:
    assert read_table(io.BytesIO(rows_parquet(ROWS))).to_pylist() == ROWS


@pytest.mark.parametrize("count", [1, 12])
def test_a_plot(count: int) -> None:
    rows = [row(f"setup-{i}", name, 0.7 + i * i / 900, 0.4 + i / 500) for i in range(count) for name in "ab"]
    picture = Image.open(io.BytesIO(plot(rows + ROWS)))
    assert picture.format == "PNG"
    assert (picture.width > 1200) == (count > 8)  # a second panel where points crowd


def test_labels_find_free_places() -> None:
    class Frame:
        x0, y0, x1, y1 = 0.0, 0.0, 400.0, 300.0

    taken = []
    for _ in range(12):  # of twelve points at the same place
        left, bottom, _distance = _place(200, 150, 60, 12, 1.0, taken, Frame)
        box = (left, bottom, left + 60, bottom + 12)
        assert not any(_overlap(box, other) for other in taken)
        taken.append(box)
    left, _, _ = _place(390, 150, 60, 12, 1.0, [], Frame)
    assert left + 60 <= 400
