"""The benchmark of many concepts on a few."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import many
from pipeline.ledger.records import load_records
from pipeline.store.storage import RunStore


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert many.main(["--concepts", "40", "--actors", "1", "--capacity", "4", "--keep", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for words in ("| 40 |", "run again with all done, s", "report.html, MB"):
        assert words in said
    records = list(load_records(RunStore(str(tmp_path / "out"))))
    assert len(records) == 40
    assert {record.gate for record in records} <= {"passed", "below"}
    assert (tmp_path / "out" / "report.html").exists()
