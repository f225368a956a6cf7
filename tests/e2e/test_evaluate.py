"""The evaluation of a run on real Ray: the table, resuming, new prompts, failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluate import main
from pipeline.exit_codes import FAILED, OK
from pipeline.store.parquet import read_table
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import tiny_extractor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.timeout(900)  # four passes of real Ray
def test_a_run_is_made_evaluated_and_resumed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, output, prompts = write_manifest(tmp_path, ["a", "b", "bad"]), tmp_path / "out", tmp_path / "p.txt"
    clip = tiny_extractor("clip", tmp_path / "clip")
    prompts.write_text("a photo of a {}\na rendering of a {}\n")
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model, extractor=str(clip), actors={"count": 1}, evaluation={"images_per_prompt": 2}))
    first = [str(manifest), "--config", str(job), "--output", str(output), "--prompts", str(prompts)]

    assert main(first) == OK
    said = capsys.readouterr().out
    assert "3 learned" in said
    assert f"quick: {3 * 2 * 4} rows scored, 0 scored before" in said
    assert "| learned | 3 |" in said
    table = read_table(output / "evaluation" / "quick.parquet")
    before = table.sort_by([("concept_id", "ascending"), ("setup", "ascending"), ("prompt", "ascending")])
    assert len(before) == 24
    assert {name for name in before.column_names if name.startswith("clip")} == {
        "clip_i", "clip_i_se", "clip_t", "clip_t_se"
    }  # fmt: skip

    assert "| setup | concepts | clip_i | clip_t | psnr_db | edge_strength | edge_ratio |" in said
    compared = {(row["setup"], row["prompt"]) for row in before.to_pylist() if row["psnr_db"] is not None}
    assert compared == {("learned", "a photo of a {}"), ("image only", "a photo of a {}")}

    again = [str(output), "--prompts", str(prompts)]  # what it was made with is in run.json
    assert main(again) == OK
    assert "quick: 0 rows scored, 24 scored before" in capsys.readouterr().out

    (tmp_path / "photos" / "bad-1.png").unlink()
    prompts.write_text("a photo of a {}\na rendering of a {}\nthe photo of a {}\n")
    assert main(again) == FAILED
    said = capsys.readouterr().out
    assert "quick: 12 rows scored, 24 scored before" in said
    assert said.splitlines()[-1].startswith("FAILED bad: photo ")
    table = read_table(output / "evaluation" / "quick.parquet").to_pylist()
    assert len(table) == 32
    assert [row for row in before.to_pylist() if row not in table] == []
