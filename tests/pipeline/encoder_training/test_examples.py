"""What training needs of a concept: planned by content, made once, and as the maker saw it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.bulk.rows import put_plan
from pipeline.config import RunConfig
from pipeline.encoder_training.examples import (
    PARTS,
    PLAN_SCHEMA,
    ExampleMaker,
    failures,
    parse_example,
    plan_examples,
    plan_examples_of_run,
)
from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_manifest
from tests.tiny_models import tiny_extractor

SHAPE = {"hidden": 16, "patch_dim": 4, "grid_side": 2, "latent_side": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_extractor("clip", tmp_path_factory.mktemp("clip")))


@pytest.fixture
def config(tiny_model: Path, clip: str, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tmp_path / "out", extractor=clip, encoder={"network": SHAPE})


def planned(config: RunConfig, manifest: Path) -> tuple[list[dict[str, Any]], list[BadRow]]:
    bad: list[BadRow] = []
    return list(plan_examples(read_manifest(str(manifest)), config, bad)), bad


def test_rows_have_the_same_id_as_long_as_their_content_has(config: RunConfig, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a", "b"])
    before, _ = planned(config, manifest)
    assert planned(config, manifest)[0] == before
    (tmp_path / "photos" / "a-0.png").write_bytes((tmp_path / "photos" / "b-0.png").read_bytes())
    changed, _ = planned(config, manifest)
    assert [row["row_id"] for row in changed] == [changed[0]["row_id"], before[1]["row_id"]]
    assert changed[0]["row_id"] != before[0]["row_id"]
    network = replace(config.encoder.network, grid_side=3)
    other = replace(config, encoder=replace(config.encoder, network=network))
    assert not {row["row_id"] for row in planned(other, manifest)[0]} & {row["row_id"] for row in changed}


def test_rows_that_cannot_be_planned_are_named(config: RunConfig, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a", "b", "b"])
    (tmp_path / "photos" / "a-1.png").unlink()
    rows, bad = planned(config, manifest)
    assert [row["concept_id"] for row in rows] == ["b"]
    assert [(row.concept_id, row.row) for row in bad] == [("b", 3), ("a", 1)]
    assert "a-1.png cannot be read" in bad[1].reason


def test_concepts_of_an_earlier_run_are_trained_on_as_it_read_them(config: RunConfig) -> None:
    done = ConceptRecord(
        concept_id="a",
        fingerprint="f",
        status="done",
        placeholder_token="<a>",
        initializer="cat",
        images=("x.png",),
        inputs={"images": ["hash"], "concept": {"captions": ["a {}"]}},
    )
    without_hashes, failed = replace(done, inputs={}), replace(done, status="failed")
    (row,) = plan_examples_of_run([without_hashes, failed, done], config)
    assert (row["concept_id"], row["image_hashes"]) == ("a", ["hash"])
    assert '"captions": ["a {}"]' in row["concept"]


def test_a_maker_makes_examples_and_blames_each_row_for_its_own_photos(config: RunConfig, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a", "b"])
    (tmp_path / "photos" / "b-1.png").write_bytes(b"no picture")
    rows, _ = planned(config, manifest)
    changed = {**rows[0], "row_id": "changed", "image_hashes": ["another", rows[0]["image_hashes"][1]]}
    results = ExampleMaker(config)(pa.Table.from_pylist([*rows, changed], PLAN_SCHEMA)).to_pylist()
    assert [row["status"] for row in results] == ["ok", "failed", "failed"]
    assert "b-1.png" in results[1]["error"]
    assert "has changed since the plan was made" in results[2]["error"]
    example = parse_example(results[0])
    assert (example.concept.concept_id, example.concept.initializer) == ("a", "cat")
    assert (len(example.features), len(example.moments)) == (2, 2)
    assert torch.isfinite(example.features).all()


def test_the_last_error_of_a_row_counts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    schema = pa.schema([("row_id", pa.string()), ("error", pa.string())])
    put_plan(store, PARTS, iter([{"row_id": "1", "error": "no picture"}, {"row_id": "2", "error": ""}]), schema)
    wanted = {"1": "a", "2": "b", "3": "c"}
    assert failures(store, wanted, {"1", "3"}) == {"a": "no picture", "c": "its photos were not read"}
