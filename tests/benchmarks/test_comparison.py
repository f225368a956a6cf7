"""Rows of a comparison as tables and as a plot whose labels can be read."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from benchmarks.comparison import rows_parquet, show_learning, show_scores, stopping
from benchmarks.plot import _overlap, _place, plot
from pipeline.store.parquet import read_table


def row(setup: str, concept: str, clip_i: float, clip_t: float | None, steps: int = 10) -> dict[str, Any]:
    return {"setup": setup, "concept_id": concept, "seed": 0, "clip_i": clip_i, "clip_i_pictures": [clip_i],
            "clip_t": clip_t, "clip_t_pictures": [] if clip_t is None else [clip_t], "steps": steps, "seconds": 2.4,
            "norm": 0.5 if steps else None, "budget": 12 if steps else 0, "kept_at": steps}  # fmt: skip


ROWS = [
    row("textual-inversion", "a", 0.7, 0.3), row("textual-inversion", "b", 0.9, 0.5),
    row("image-only", "a", 0.8, None, 0), row("image-only", "b", 0.8, 0.1, 0),
]  # fmt: skip


def test_the_table_has_every_score_that_rows_hold() -> None:
    rows = [*ROWS, {**row("other", "a", 0.7, 0.3), "mirror_i": 0.5, "mirror_i_pictures": [0.4, 0.6]}]
    said = show_scores(rows, "textual-inversion", {"other": "as scored by a further extractor"})
    assert "2 concepts, seeds 0." in said
    assert "| setup | CLIP-I | CLIP-T | mirror cosine | concepts |  |" in said
    assert "| other | 0.700 | 0.300 | 0.500 | 1 | as scored by a further extractor |" in said
    assert "| other less textual-inversion | +0.000 | +0.000 | - |" in said


def test_the_table_of_learning() -> None:
    rows = [*ROWS, row("dvar", "a", 0.7, 0.3, 12) | {"kept_at": 6}, row("dvar", "b", 0.9, 0.5, 8)]
    lines = show_learning(rows).splitlines()
    assert lines[2:] == [
        "| textual-inversion | 0.500 ± 0.000 | 10 | 10 | 2 | 2 |",
        "| dvar | 0.500 ± 0.000 | 10 (8 to 12) | 7 (6 to 8) | 1 | 2 |",
    ]


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
        "| all 2 | 8 | 12 | 8 | 0.400 ± 2.541 | 0.500 ± 2.541 | -0.100 ± 0.000 | 0.200 | 0.200 | +0.000 | 2 | 2 |",
    ]
    assert stopping(ROWS, {"dvar": "dvar-budget"}) == ""


def test_rows_survive_as_parquet() -> None:
    more = {**ROWS[0], "mirror_i": 0.5, "mirror_i_pictures": [0.5]}
    read = read_table(io.BytesIO(rows_parquet([*ROWS, more]))).to_pylist()
    assert read[-1] == more
    assert read[0] == {**ROWS[0], "mirror_i": None, "mirror_i_pictures": None}


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
