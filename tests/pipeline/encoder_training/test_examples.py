"""What training needs of a concept: planned by content, made once, and as the maker saw it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
from pipeline.ledger.records import ConceptRecord, StoredFile
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_manifest
from tests.tiny_models import tiny_extractor
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.encoder_config import EncoderTrainingConfig
from textual_inversion.formats import dump_diffusers

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


DONE = ConceptRecord(
    concept_id="a",
    fingerprint="f",
    status="done",
    placeholder_token="<a>",
    initializer="cat",
    images=("x.png",),
    files={"learned_embeds.safetensors": StoredFile(bytes=1, sha256="digest")},
    gate="passed",
    inputs={"images": ["hash"], "concept": {"captions": ["a {}"]}},
)


def test_concepts_of_an_earlier_run_are_trained_on_as_it_read_them(config: RunConfig) -> None:
    without_hashes, failed = replace(DONE, inputs={}), replace(DONE, status="failed")
    (row,) = plan_examples_of_run([without_hashes, failed, DONE], config)
    assert (row["concept_id"], row["image_hashes"], row["embedding"]) == ("a", ["hash"], None)
    assert '"captions": ["a {}"]' in row["concept"]


def with_row_weight(config: RunConfig, run: Path) -> RunConfig:
    training = EncoderTrainingConfig(row_weight=0.1)
    return replace(config, encoder=replace(config.encoder, training=training, from_run=str(run)))


def test_a_concept_of_an_earlier_run_that_its_gate_let_pass_gives_its_rows_too(
    config: RunConfig, tmp_path: Path
) -> None:
    files = {**DONE.files, "adapter.safetensors": StoredFile(bytes=1, sha256="another")}
    without = [replace(DONE, gate="below"), replace(DONE, num_vectors=2), replace(DONE, files=files)]
    weighted = with_row_weight(config, tmp_path / "night")
    photos_alone, *others, kept = plan_examples_of_run([*without, replace(DONE, kept="g")], weighted)
    folder = tmp_path / "night" / "concepts" / "a" / "g"
    known = {"uri": str(folder / "learned_embeds.safetensors"), "bytes": 1, "sha256": "digest"}
    assert kept["embedding"] == known
    (unweighted,) = plan_examples_of_run([DONE], config)
    for row in (photos_alone, *others):
        assert row == unweighted, "the example without rows is that of a training to which they do not count"
    moved, relearned = plan_examples_of_run(
        [DONE, replace(DONE, files={"learned_embeds.safetensors": StoredFile(bytes=1, sha256="other")})], weighted
    )
    assert len({each["row_id"] for each in (unweighted, kept, moved, relearned)}) == 3
    assert moved["row_id"] == kept["row_id"], "addresses do not count"


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


@pytest.fixture
def rows_of_embedding(config: RunConfig, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a maker's result for a concept with an embedding that a model with this digest learned."""
    maker = ExampleMaker(config)
    (row,), _ = planned(config, write_manifest(tmp_path, ["a"]))
    dim = maker._backbone.token_tables["clip_l"].dim

    def make(model: str = "", *, damaged: bool = False) -> dict[str, Any]:
        metadata = {"model_hash": model or maker._backbone.model_hash()}
        vectors = {"clip_l": torch.arange(float(dim))[None]}
        data = dump_diffusers(LearnedEmbedding(placeholder_token="<a>", vectors=vectors, metadata=metadata))
        path = tmp_path / "learned_embeds.safetensors"
        path.write_bytes(data)
        digest = "0" * 64 if damaged else hashlib.sha256(data).hexdigest()
        embedding = {"uri": str(path), "bytes": len(data), "sha256": digest}
        (result,) = maker(pa.Table.from_pylist([row | {"embedding": embedding}], PLAN_SCHEMA)).to_pylist()
        return result

    return make


def test_an_example_has_the_rows_that_its_own_model_learned(rows_of_embedding: Callable[..., dict[str, Any]]) -> None:
    rows = parse_example(rows_of_embedding()).learned_rows
    assert rows is not None
    assert list(rows) == ["clip_l"]
    assert torch.equal(rows["clip_l"], torch.arange(float(rows["clip_l"].shape[1]))[None])
    assert parse_example(rows_of_embedding(model="another")).learned_rows is None


def test_an_embedding_that_is_not_its_records_costs_its_concept(
    rows_of_embedding: Callable[..., dict[str, Any]],
) -> None:
    result = rows_of_embedding(damaged=True)
    assert result["status"] == "failed"
    assert "learned_embeds.safetensors is not the file that its record names" in result["error"]


def test_the_last_error_of_a_row_counts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    schema = pa.schema([("row_id", pa.string()), ("error", pa.string())])
    put_plan(store, PARTS, iter([{"row_id": "1", "error": "no picture"}, {"row_id": "2", "error": ""}]), schema)
    wanted = {"1": "a", "2": "b", "3": "c"}
    assert failures(store, wanted, {"1", "3"}) == {"a": "no picture", "c": "its photos were not read"}
