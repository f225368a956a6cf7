"""Actors live from learning to the end of a run: each loads the model once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.exit_codes import OK
from pipeline.inputs.models import locate
from pipeline.ledger.records import load_records
from pipeline.run import main
from pipeline.store.storage import RunStore
from tests.e2e.counted_loads import NotingActor, notes_of
from tests.pipeline.runs import tiny_toml, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_run_loads_the_model_once_an_actor(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "ModelActor", NotingActor)
    manifest, output = write_manifest(tmp_path, [f"c{number}" for number in range(4)]), str(tmp_path / "out")
    (tmp_path / "job.toml").write_text(
        tiny_toml(
            tiny_model,
            extractor=locate("demo/clip"),
            inversion={"steps": 4, "batch_size": 2},
            gate={"min_clip_i": 2.0, "ladder": ["seed", "steps*2"]},  # which nothing reaches
            actors={"count": 2},
        )
    )
    assert main([str(manifest), "--config", str(tmp_path / "job.toml"), "--output", output]) == OK
    assert "4 learned" in capsys.readouterr().out
    records = [record for record in load_records(RunStore(output)) if record.tries]
    assert [[each.rung for each in record.tries] for record in records] == [["", "seed", "steps*2"]] * 4
    loads = Counter(notes_of(output).read_text().split())
    assert set(loads.values()) == {1}
    assert 1 <= len(loads) <= 2
