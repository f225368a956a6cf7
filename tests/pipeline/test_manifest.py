"""The command that writes a manifest of photos."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.exit_codes import FAILED, OK, USAGE
from pipeline.explain import explain
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.manifest import main
from pipeline.run import main as run_main
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_toml, write_photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with the photos of three concepts in folders of their own, one described by metadata."""
    for seed, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "ink/1.png")):
        write_photo(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "metadata.csv").write_text(
        "concept_id,initializer,shelf,category\ncat,cat,4,\nink,,x,style\n"
    )
    return tmp_path / "photos"


def concepts(uri: Path) -> list[ManifestRow]:
    return [row for row in read_manifest(str(uri)) if isinstance(row, ManifestRow)]


def test_the_manifest_means_what_the_folder_means(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "elsewhere" / "m.parquet"
    assert main([str(photos), "--output", str(output)]) == OK
    out = capsys.readouterr().out
    assert out.startswith("note: no initializer")
    assert out.endswith(f"3 concepts with 4 photos, 0 bad rows; {output}\n")
    assert [row.concept for row in concepts(output)] == [row.concept for row in concepts(photos)]
    assert [row.carried for row in concepts(output)] == [{"shelf": "4"}, {"shelf": None}, {"shelf": "x"}]
    again = tmp_path / "again.parquet"
    assert main([str(output), "--output", str(again)]) == OK
    assert [row.concept for row in concepts(again)] == [row.concept for row in concepts(output)]


def test_the_command_line_fills_what_is_missing(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.parquet"
    assert main([str(photos), "--output", str(output), "--initializer", "toy", "--style"]) == OK
    assert [row.concept.initializer for row in concepts(output)] == ["cat", "toy", "toy"]
    assert {row.concept.category for row in concepts(output)} == {"style"}


def test_bad_rows_are_left_out_and_values_of_many_types_carried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"concept_id": "a", "images": "a.png", "size": 3}\n{"concept_id": "b", "images": "b.png", "size": "L"}\n'
        '{"concept_id": "c"}\n'
    )
    assert main([str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "m.parquet")]) == FAILED
    assert f"bad row: {tmp_path}/m.jsonl, row 3 (c): " in capsys.readouterr().out
    assert [row.carried for row in concepts(tmp_path / "m.parquet")] == [{"size": "3"}, {"size": '"L"'}]


@pytest.mark.parametrize(
    ("output", "message"),
    [("m.csv", "must end with .parquet"), ("photos/m.parquet", "which would be read as that table from then on")],
)
def test_outputs_that_are_no_manifest(
    photos: Path, tmp_path: Path, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(photos), "--output", str(tmp_path / output)]) == USAGE
    assert message in capsys.readouterr().err


def test_a_run_takes_the_folder_as_it_takes_the_manifest(
    photos: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model))
    common = ["--config", str(tmp_path / "job.toml"), "--output", str(tmp_path / "out"), "--dry-run", "--photos"]
    assert run_main([str(photos), *common]) == OK
    out = capsys.readouterr().out
    assert "note: no initializer" in out
    assert out.endswith(f"0 done, 3 to do, 0 bad rows, 0 prompts; output {tmp_path}/out\n")
    found = explain(RunStore(str(tmp_path / "out")), "cat", str(photos))
    assert (found.place, len(found.photos)) == (f"{photos}/, row 1", 2)
