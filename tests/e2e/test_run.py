"""The whole command on real Ray: results, resuming, changed inputs, failures, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.actor.library import read_embedding
from pipeline.actor.model_loading import load_model
from pipeline.config_file import parse_config
from pipeline.exit_codes import FAILED, OK
from pipeline.explain import explain
from pipeline.report.run_status import read_status
from pipeline.run import main
from pipeline.store.parquet import read_table, read_tables
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_toml, tiny_tree, write_manifest, write_photo
from tests.pipeline.tracking.test_feed import StandIn
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.strips import Strip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def files(output: Path, concept_id: str) -> dict[str, bytes]:
    """Name -> content of all a concept has, under whichever fingerprint."""
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted((output / "concepts" / concept_id).rglob("*.*"))}


def test_learn_resume_change_and_fail(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for a tracker's client; `tests/pipeline/tracking` has the clients."""
    trackers: list[StandIn] = []

    def start_tracker(*_: object) -> StandIn:
        trackers.append(StandIn())
        return trackers[-1]

    monkeypatch.setattr("pipeline.run.check_tracking", lambda _: None)
    monkeypatch.setattr("pipeline.tracking.sender.start_tracker", start_tracker)
    manifest, output = write_manifest(tmp_path, ["good", "other", "bad"]), tmp_path / "out"
    (tmp_path / "photos" / "bad-1.png").write_bytes(b"not a picture")
    config = tmp_path / "job.toml"
    config.write_text(tiny_toml(tiny_model, actors={"count": 1}, tracking="tensorboard", preview={"steps": 3}))
    command = [str(manifest), "--config", str(config), "--output", str(output)]

    assert main([*command, "--dry-run"]) == OK
    assert "0 done, 3 to do, 0 bad rows" in capsys.readouterr().out
    assert not output.exists()

    assert main(command) == FAILED
    said = capsys.readouterr().out
    assert said.startswith("2 learned, 0 done before, 1 failed")
    assert said.splitlines()[-1].startswith("FAILED bad: photo ")
    before = files(output, "good")
    assert [Path(name).name for name in before] == [
        "curve.parquet", "grid.png", "learned_embeds.safetensors", "log.jsonl", "previews.png", "record.json"
    ]  # fmt: skip
    (strip,) = (output / "concepts" / "good").rglob("previews.png")
    assert list(Strip.from_png(strip.read_bytes()).pictures) == [0, 3, 6]
    assert [Path(name).name for name in files(output, "bad")] == ["failure.json", "log.jsonl"]
    statuses = read_table(output / "results.parquet", ["concept_id", "status"]).to_pylist()
    assert {row["concept_id"]: row["status"] for row in statuses} == {"good": "done", "other": "done", "bad": "failed"}
    assert "bad" in (output / "report.html").read_text()
    assert json.loads((output / "run.json").read_text())["counts"]["learned"] == 2
    (tracker,) = trackers
    assert [number for number, _ in tracker.values] == [1, 2, 3]
    assert tracker.curves == [name for _, name in tracker.grids]
    assert sorted(tracker.curves) == ["good", "other"]
    assert tracker.is_closed

    write_photo(tmp_path / "photos" / "other-0.png", 99)
    write_photo(tmp_path / "photos" / "bad-1.png", 98)
    found = explain(RunStore(str(output)), "other")
    assert found.differences == [f"photo 1 has other bytes: {tmp_path / 'photos' / 'other-0.png'}"]
    assert main([*command, "--retry", "failed", "--dry-run"]) == OK
    assert "1 done, 1 to do, 1 left out by --retry failed, 0 bad rows" in capsys.readouterr().out
    assert main(command) == OK
    assert capsys.readouterr().out.startswith("2 learned, 1 done before, 0 failed")
    assert files(output, "good") == before
    assert len(list((output / "concepts" / "other").iterdir())) == 2

    assert main(command) == OK
    assert capsys.readouterr().out.startswith("0 learned, 3 done before, 0 failed")
    status = read_status(RunStore(str(output)))
    assert (status.stage, status.done, status.done_before, status.failed, status.waiting) == ("ended", 3, 3, 0, 0)


def test_pictures_of_every_concept(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, output, prompts = write_manifest(tmp_path, ["a", "b"]), tmp_path / "out", tmp_path / "prompts.txt"
    too_long = "a photo of a very " + "clean " * 40 + "{}"
    prompts.write_text(f"a photo of a {{}}\n\n# not a prompt\na rendering of a {{}}\n{too_long}\n")
    config = tmp_path / "job.toml"
    adapter = {"kind": "causal", "rank": 1, "learning_rate": 0.1, "targets": ["fc2", "cross_attention"]}
    inversion = {"steps": 6, "batch_size": 2, "adapter": adapter}
    config.write_text(tiny_toml(tiny_model, actors={"count": 1}, inversion=inversion))
    command = [str(manifest), "--config", str(config), "--output", str(output), "--prompts", str(prompts)]

    assert main(command) == FAILED
    said = capsys.readouterr().out
    assert "pictures: 4 drawn, 0 done before, 2 failed" in said
    assert "FAILED drawing: 2 pictures were not drawn: prompt" in said
    pictures = {path: path.read_bytes() for path in (output / "images").glob("*/*.png")}
    assert {path.parent.name for path in pictures} == {"a", "b"}
    assert len(pictures) == 4

    prompts.write_text("a photo of a {}\na rendering of a {}\nthe photo of a {}\n")
    assert main(command) == OK
    assert "pictures: 2 drawn, 4 done before, 0 failed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in pictures} == pictures
    rows = read_tables(output / "images" / "metadata").to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    assert len(ok) == len({row["row_id"] for row in ok}) == 6
    assert all((output / row["path"]).stat().st_size == row["bytes"] for row in ok)

    (found,) = output.glob("concepts/b/*/learned_embeds.safetensors")
    learned = read_embedding(str(found))
    assert learned.adapter is not None
    resolved = parse_config(tiny_tree(tiny_model))
    for row in ok:
        if row["concept_id"] == "b":
            request = ImageRequest(row["prompt"], row["seed"], (learned,))
            (expected,) = generate(load_model(resolved), [request], resolved.generation.sampling)
            with Image.open(output / row["path"]) as drawn:
                assert drawn.tobytes() == expected.tobytes(), "pictures in bulk are drawn with the adapter"
