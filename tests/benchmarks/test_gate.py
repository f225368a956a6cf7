"""The benchmark of the quality gate on one concept, with a gate that nothing passes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import gate
from benchmarks.gate import RetriedConcept, by_concept, by_rule
from pipeline.ledger.records import Try
from pipeline.store.parquet import read_table
from tests.pipeline.runs import BY_HAND

ROOT = Path(__file__).resolve().parents[2]


def one(rung: str, clip_i: float, error: str = "") -> Try:
    return Try(rung=rung, fingerprint=f"f-{rung}", scores={} if error else {"clip_i": clip_i}, error=error)


def test_figures_are_of_other_pictures_than_the_choice() -> None:
    tries = (one("", 0.1), one("seed", 0.9), one("steps*2", 0.0, "not finite"))
    retried = RetriedConcept(
        0, "cat", tries, 1, True, [{"clip_i": 0.25, "clip_t": 0.5}, {"clip_i": 0.5, "clip_t": 0.25}, {}]
    )
    (row,) = by_concept([retried])[1]
    assert row[2:6] == ["0.100, 0.900, failed", "seed", 0.25, 0.5]
    rows = by_rule([retried, retried])[1]
    assert rows == [["what was kept", 2, 0.25, 0.0, 2, -0.25], ["retry rule `seed`", 2, 0.25, 0.0, 2, -0.25]]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_table(ROOT / "manifests/demo.parquet").slice(0, 1).to_pylist()
    for row in table:
        row["images"] = [str((ROOT / "manifests" / uri).resolve()) for uri in row["images"]]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "m.parquet")
    settings = ["inversion.steps=2", "gate.min_clip_i=2.0", 'gate.ladder=["seed"]', "grid.sampling.steps=2",
                "grid.images_per_prompt=1", *(f"actors.{name}={value}" for name, value in BY_HAND.items())]  # fmt: skip
    arguments = [f"--set={each}" for each in settings]
    assert (
        gate.main(
            ["--manifest", str(tmp_path / "m.parquet"), "--output", str(tmp_path), "--processes", "1", *arguments]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "| 0 | 1 | 1 | 0 | 1 | 2 | 2 |" in said
    assert "retry rule `seed`" in said
