"""The evaluation's actor without a cluster, on tiny random models: scores equal those made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.bulk.evaluation import DINO_SCORES, PIXEL_SCORES, PLAN_SCHEMA, RESULT_SCHEMA, plan_rows
from pipeline.bulk.protocols import Protocol
from pipeline.bulk.scorer import Scorer
from pipeline.config import RunConfig
from pipeline.inputs.photos import content_md5
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord, StoredFile, put_record
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_photo
from tests.tiny_models import DIM, tiny_extractor
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.extractors import ClipExtractor, load_extractor
from textual_inversion.families.base import Backbone
from textual_inversion.fidelity import pixel_scores, pixel_scores_between_photos, to_arrays
from textual_inversion.formats import dump_diffusers
from textual_inversion.generate import ImageRequest, generate

PROMPTS = (Prompt("a photo of a {}"), Prompt("{}"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractor("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractor("vit", tmp_path_factory.mktemp("dino"))


@pytest.fixture
def config(tiny_model: Path, clip: Path, dino: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tmp_path, extractor=str(clip), evaluation={"dino": str(dino)})


def learned(config: RunConfig, name: str, photos: int = 2, seed: int = 0) -> tuple[ConceptRecord, LearnedEmbedding]:
    """A record whose embedding and photos are there."""
    images = tuple(write_photo(Path(config.output) / f"{name}-{i}.png", seed + i) for i in range(photos))
    rows = torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))
    embedding = LearnedEmbedding(placeholder_token=f"<{name}>", vectors={"clip_l": rows})
    record = ConceptRecord(
        concept_id=name,
        fingerprint=f"f-{name}",
        status="done",
        placeholder_token=f"<{name}>",
        initializer="cat",
        images=images,
    )
    store, data = RunStore(config.output), dump_diffusers(embedding)
    stored = StoredFile(bytes=len(data), sha256=store.put_checked(record.folder.embedding, data))
    record = replace(record, files={"learned_embeds.safetensors": stored})
    put_record(store, record)
    return record, embedding


def scored(config: RunConfig, *records: ConceptRecord, scorer: Scorer | None = None) -> list[dict[str, Any]]:
    protocol = Protocol(prompts=PROMPTS, images_per_prompt=3, sampling=config.generation.sampling)
    batch = pa.Table.from_pylist(list(plan_rows(config, protocol, records)), PLAN_SCHEMA)
    results = (scorer or Scorer(config))(batch)
    assert results.schema == RESULT_SCHEMA
    assert results["row_id"].to_pylist() == batch["row_id"].to_pylist()
    return results.to_pylist()


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2)


def test_scores_by_hand(config: RunConfig, tiny_backbone: Backbone, clip: Path, dino: Path) -> None:
    record, embedding = learned(config, "a")
    rows = {(row["setup"], row["prompt"]): row for row in scored(config, record)}
    protocol = Protocol(prompts=PROMPTS, images_per_prompt=3, sampling=config.generation.sampling)
    seeds = next(plan_rows(config, protocol, [record]))["seeds"]
    photos = [Image.open(path) for path in record.images]
    extractor, other = ClipExtractor(str(clip), "cpu"), load_extractor(str(dino), "cpu")
    text = extractor.texts(["a photo of a"])

    for setup, prompt, embeddings in (
        ("learned", "a photo of a <a>", (embedding,)),
        ("initializer", "a photo of a cat", ()),
        ("prompt only", "a photo of a", ()),
    ):
        requests = [ImageRequest(prompt, seed, embeddings) for seed in seeds]
        pictures = generate(tiny_backbone, requests, config.generation.sampling)
        row = rows[setup, "a photo of a {}"]
        of_each = cosines(extractor.images(pictures), extractor.images(photos)).mean(1)
        assert row["clip_i"] == pytest.approx(of_each.mean().item(), abs=1e-5)
        assert row["clip_i_se"] == pytest.approx(of_each.std().item() / 3**0.5, abs=1e-5)
        assert row["clip_t"] == pytest.approx(cosines(extractor.images(pictures), text).mean().item(), abs=1e-5)
        wanted = cosines(other.images(pictures), other.images(photos)).mean().item()
        assert row["dino"] == pytest.approx(wanted, abs=1e-5)
        turned = cosines(other.images(pictures), other.images([ImageOps.mirror(photo) for photo in photos])).mean()
        assert row["mirror_margin"] == pytest.approx(wanted - turned.item(), abs=1e-5)
    among = rows["image only", "a photo of a {}"]
    assert among["clip_i"] == pytest.approx(cosines(*extractor.images(photos)[:, None]).item(), abs=1e-5)
    assert among["num_samples"] == 2
    first, second = photos
    both_ways = [(first, second), (second, first)]
    turned = [cosines(*other.images([one, ImageOps.mirror(another)])[:, None]).item() for one, another in both_ways]
    assert among["mirror_margin"] == pytest.approx(among["dino"] - sum(turned) / 2, abs=1e-5)
    assert rows["learned", "{}"]["clip_t"] is None  # nothing but the concept: no text to compare with
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_pixel_scores_by_hand(config: RunConfig, tiny_backbone: Backbone) -> None:
    (record, embedding), (style, _) = learned(config, "a", photos=3), learned(config, "s")
    protocol = Protocol(
        prompts=PROMPTS,
        images_per_prompt=3,
        sampling=config.generation.sampling,
        reconstruction=("a photo of a {}",),
    )
    plan = list(plan_rows(config, protocol, [record, replace(style, category="style")]))
    results = Scorer(config)(pa.Table.from_pylist(plan, PLAN_SCHEMA)).to_pylist()
    rows = {(row["concept_id"], row["setup"], row["prompt"]): row for row in results}
    requests = [ImageRequest("a photo of a <a>", seed, (embedding,)) for seed in plan[0]["seeds"]]
    pictures = generate(tiny_backbone, requests, config.generation.sampling)
    photos = to_arrays([Image.open(path) for path in record.images], pictures[0].size)
    for setup, by_hand in (
        ("learned", pixel_scores(to_arrays(pictures, pictures[0].size), photos)),
        ("image only", pixel_scores_between_photos(photos)),
    ):
        row = rows.pop(("a", setup, "a photo of a {}"))
        for name, values in by_hand.items():
            assert row[name] == pytest.approx(values.mean().item(), abs=1e-5)
            assert row[f"{name}_se"] == pytest.approx(values.std().item() / 3**0.5, abs=1e-5)
    assert {row[name] for row in rows.values() for name in PIXEL_SCORES} == {None}
    assert {row["status"] for row in results} == {"ok"}


def test_one_bad_concept_never_takes_the_others_with_it(config: RunConfig) -> None:
    (good, _), (no_photo, _), (no_embedding, _) = (learned(config, name, seed=9) for name in ("a", "b", "c"))
    Path(no_photo.images[1]).unlink()
    RunStore(config.output).delete(no_embedding.folder.embedding)
    rows = scored(config, good, no_photo, no_embedding)
    failed = {(row["concept_id"], row["setup"]): row["error"] for row in rows if row["status"] == "failed"}
    assert set(failed) == {("b", s) for s in ("learned", "initializer", "prompt only", "image only")} | {
        ("c", "learned")
    }
    assert f"photo {no_photo.images[1]}" in failed["b", "learned"]
    assert no_embedding.folder.embedding in failed["c", "learned"]
    assert [row["clip_i"] for row in scored(config, good)] == [r["clip_i"] for r in rows if r["concept_id"] == "a"]


def test_photos_that_are_not_those_of_the_record_are_refused(config: RunConfig) -> None:
    (still, _), (moved, _) = learned(config, "a"), learned(config, "b")
    hashes = {path: content_md5(Path(path).read_bytes()) for path in (*still.images, *moved.images)}
    known = [replace(one, inputs={"images": [hashes[path] for path in one.images]}) for one in (still, moved)]
    write_photo(Path(moved.images[1]), 77)
    rows = scored(config, *known)
    assert {row["status"] for row in rows if row["concept_id"] == "a"} == {"ok"}
    assert {row["error"] for row in rows if row["concept_id"] == "b"} == {
        f"photo {moved.images[1]} is not the one that the concept was learned from; run pipeline.run again, then this"
    }
    plain = scored(config, still, moved)  # records of an earlier release name no hashes
    assert {row["status"] for row in plain} == {"ok"}
    assert [row["row_id"] for row in plain] == [row["row_id"] for row in rows]


def test_what_concepts_share_is_drawn_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, drawn = Scorer(config), []
    draw = scorer._drawer.draw

    def counting(rows: list[dict[str, Any]], sampling: Any) -> Any:
        drawn.extend((row["prompt"], row["embedding"]) for row in rows)
        return draw(rows, sampling)

    monkeypatch.setattr(scorer._drawer, "draw", counting)
    first = scored(config, learned(config, "a")[0], learned(config, "b", seed=5)[0], scorer=scorer)
    assert len(drawn) == 3 * (2 * 2 + 2 + 1)  # two concepts and prompts; the initializer's two; one without the word
    drawn.clear()
    again = scored(config, learned(config, "a")[0], learned(config, "b", seed=5)[0], scorer=scorer)
    assert len(drawn) == 3 * 2 * 2
    assert again == first


def test_without_dino_that_score_is_left_out(config: RunConfig) -> None:
    config = replace(config, evaluation=replace(config.evaluation, dino=""))
    rows = scored(config, learned(config, "a")[0])
    assert {row[name] for row in rows for name in DINO_SCORES} == {None}
