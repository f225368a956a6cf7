"""The drawing actor without a cluster: what a batch of rows becomes."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import pipeline.bulk.drawer
from pipeline.actor import library
from pipeline.actor.publish import to_png
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord, StoredFile, put_record
from pipeline.store.addresses import read_bytes
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config
from tests.tiny_models import DIM
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.batch_invariance import drawing_is_invariant
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.families.base import Backbone
from textual_inversion.formats import ADAPTER_FILE, dump_diffusers, parse_diffusers
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.lora import initial_adapter

PROMPTS = [Prompt("a photo of a {}"), Prompt("a rendering of a {}")]


def record(name: str) -> ConceptRecord:
    return ConceptRecord(concept_id=name, fingerprint=f"f-{name}", status="done", placeholder_token=f"<{name}>")


def an_embedding(name: str, seed: int) -> LearnedEmbedding:
    rows = torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))
    return LearnedEmbedding(placeholder_token=f"<{name}>", vectors={"clip_l": rows})


def learned(store: RunStore, name: str, seed: int) -> ConceptRecord:
    """A record whose embedding is in the store."""
    return put(store, record(name), an_embedding(name, seed))


def put(store: RunStore, one: ConceptRecord, embedding: LearnedEmbedding) -> ConceptRecord:
    """Put an embedding, without its adapter, and its record; return the record."""
    data = dump_diffusers(embedding)
    files = {
        "learned_embeds.safetensors": StoredFile(bytes=len(data), sha256=store.put_checked(one.folder.embedding, data))
    }
    put_record(store, replace(one, files=files))
    return replace(one, files=files)


def with_adapter(
    backbone: Backbone, embedding: LearnedEmbedding, kind: Any, targets: tuple[str, ...]
) -> LearnedEmbedding:
    generator = torch.Generator().manual_seed(9)
    start = initial_adapter(backbone.adapter_layers, targets, 2, generator)
    tensors = {name: (down, 0.3 * torch.randn(up.shape, generator=generator)) for name, (down, up) in start.items()}
    return replace(embedding, adapter=LearnedAdapter(kind=kind, scale=0.5, tensors=tensors))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_is_drawn_and_described(tiny_model: Path, tmp_path: Path, packed: bool) -> None:
    config = tiny_config(tiny_model, tmp_path, generation={"packed": packed})
    store = RunStore(str(tmp_path))
    records = [learned(store, "a", 1), learned(store, "b", 2), record("gone")]
    too_long = Prompt("a very " + "clean " * 40 + "{}")
    rows = list(plan_rows(config, records, [PROMPTS[0], too_long]))
    drawer = Drawer(config)
    results = drawer(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()

    assert [row["row_id"] for row in results] == [row["row_id"] for row in rows]
    assert [row["status"] for row in results] == ["ok", "failed"] * 2 + ["failed"] * 2
    assert "clean clean" in results[1]["error"]
    assert "FileNotFoundError" in results[4]["error"]
    for row in results[0], results[2]:
        data = row["png"] if packed else store.get(row["path"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])
    assert bool(store.list("images")) != packed

    alone = drawer(pa.Table.from_pylist(rows[2:3], PLAN_SCHEMA)).to_pylist()[0]
    assert alone["sha256"] == results[2]["sha256"]


def test_a_bug_with_one_row_ends_that_row_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = tiny_config(tiny_model, tmp_path), RunStore(str(tmp_path))
    rows = list(
        plan_rows(config, [learned(store, "a", 1), learned(store, "b", 2), learned(store, "c", 3)], PROMPTS[:1])
    )
    check, to_png = pipeline.bulk.drawer.encode_request, pipeline.bulk.drawer.to_png
    stored = iter([False, True])

    def unforeseen(backbone: Any, request: Any) -> Any:
        return 1 / 0 if "<a>" in request.prompt else check(backbone, request)

    def unforeseen_later(picture: Any) -> bytes:
        return to_png(picture) if next(stored) else {}["a mistake in the code"]

    monkeypatch.setattr(pipeline.bulk.drawer, "encode_request", unforeseen)
    monkeypatch.setattr(pipeline.bulk.drawer, "to_png", unforeseen_later)
    results = Drawer(config)(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    errors = {row["concept_id"]: row["error"] for row in results if row["status"] == "failed"}
    assert "bug in this software, not a fault of the concept: ZeroDivisionError" in errors.pop("a")
    ((_, error),) = errors.items()  # of the other two, which are stored in either order
    assert "KeyError: 'a mistake in the code'" in error


def test_an_embedding_of_another_model_is_not_drawn(tiny_model: Path, tmp_path: Path) -> None:
    config, store = tiny_config(tiny_model, tmp_path), RunStore(str(tmp_path))
    rows = list(plan_rows(config, [learned(store, "a", 1)], PROMPTS[:1]))
    embedding = parse_diffusers(store.get(rows[0]["embedding"]))
    other = replace(embedding, metadata={**embedding.metadata, "model_hash": "0123abcd"})
    put(store, record("a"), other)
    drawer = Drawer(config)
    (result,) = drawer(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    assert result["status"] == "failed"
    assert f"with the model 0123abcd, but this worker has loaded {drawer._backbone.model_hash()}" in result["error"]


def test_an_embedding_that_is_not_its_records_is_not_drawn(tiny_model: Path, tmp_path: Path) -> None:
    config, store = tiny_config(tiny_model, tmp_path), RunStore(str(tmp_path))
    records = [learned(store, name, seed) for seed, name in enumerate("ab")]
    a, b = (store.get(each.folder.embedding) for each in records)
    store.put(records[0].folder.embedding, b)
    store.put(records[1].folder.embedding, a)
    rows = list(plan_rows(config, records, PROMPTS[:1]))
    results = Drawer(config)(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    assert [result["status"] for result in results] == ["failed", "failed"]
    assert all("is not the file that its record names" in result["error"] for result in results)


def test_a_calls_embeddings_are_fetched_side_by_side_and_once_each(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = tiny_config(tiny_model, tmp_path), RunStore(str(tmp_path))
    records = [*(learned(store, f"c{number}", number) for number in range(16)), record("gone")]
    drawer = Drawer(config)
    asked: list[str] = []
    together = threading.Barrier(2)  # passed only if two are fetched at a time

    def fetch(uri: str) -> bytes:
        asked.append(uri)
        together.wait(120)
        return read_bytes(uri)

    monkeypatch.setattr(library, "read_bytes", fetch)
    rows = list(plan_rows(config, records, PROMPTS))
    results = drawer.draw(rows, config.generation.sampling)
    assert sorted(asked) == sorted(store.uri(each.folder.embedding) for each in records[:-1])
    wrong = [row["concept_id"] for row, result in zip(rows, results, strict=True) if isinstance(result, str)]
    assert wrong == ["gone"] * len(PROMPTS)


@pytest.mark.parametrize(
    ("kind", "targets"), [("lora", ("fc2", "v_proj")), ("causal", ("fc2",)), ("causal", ("fc2", "cross_attention"))]
)
def test_a_concept_is_drawn_with_its_adapter(
    tiny_backbone: Backbone, tiny_model: Path, tmp_path: Path, kind: Any, targets: tuple[str, ...]
) -> None:
    config, store = tiny_config(tiny_model, tmp_path), RunStore(str(tmp_path))
    plain, adapted, lost = record("plain"), record("adapted"), record("lost")
    embeddings = [an_embedding("plain", 1), with_adapter(tiny_backbone, an_embedding("adapted", 1), kind, targets)]
    for one, embedding in ((plain, embeddings[0]), (adapted, embeddings[1]), (lost, embeddings[1])):
        put(store, one, embedding)
    store.put(adapted.folder.adapter, dump_adapter(embeddings[1]))
    assert adapted.folder.adapter == adapted.folder.file(ADAPTER_FILE)

    requests = [
        ImageRequest(f"a photo of a {embedding.placeholder_token}", 3, (embedding,))
        for embedding in (embeddings[1], embeddings[0], replace(embeddings[1], adapter=None))
    ]
    expected = generate(tiny_backbone, requests, config.generation.sampling)
    drawer = Drawer(config)
    rows = [
        {"embedding": one.folder.embedding, "prompt": f"a photo of a {word}", "seed": 3}
        for one, word in ((adapted, "<adapted>"), (plain, "<plain>"), (lost, "<adapted>"))
    ]
    with_it, without, missing = drawer.draw(rows, config.generation.sampling)
    assert not isinstance(with_it, str)
    assert not isinstance(without, str)
    assert with_it.tobytes() == expected[0].tobytes() != expected[2].tobytes()
    assert without.tobytes() == expected[1].tobytes()
    assert isinstance(missing, str), "an adapter that is named but not there must not be left out in silence"
    assert ADAPTER_FILE in missing


def test_pictures_are_stored_while_the_next_are_drawn(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two batches in one call, the first is in the store before the second is drawn."""
    config = tiny_config(tiny_model, tmp_path)
    size = config.generation.sampling.batch_size
    drawn: list[int] = []

    def draw(*arguments: Any) -> list[Any]:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("images/*/*.png"))) < sum(drawn) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(tmp_path.glob("images/*/*.png"))) == sum(drawn)
        pictures = plain_draw(*arguments)
        drawn.append(len(pictures))
        return pictures

    monkeypatch.setattr(pipeline.bulk.drawer, "choose_sampling", lambda _backbone, sampling, *_: (sampling, True))
    plain_draw = pipeline.bulk.drawer.draw
    monkeypatch.setattr(pipeline.bulk.drawer, "draw", draw)
    rows = [
        {"row_id": f"r{i}", "concept_id": "c", "fingerprint": "f", "embedding": "", "prompt": "a cat", "seed": i}
        for i in range(2 * size)
    ]
    results = Drawer(config)(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    assert drawn == [size, size]
    assert [(row["row_id"], row["status"]) for row in results] == [(row["row_id"], "ok") for row in rows]


def test_rows_with_settings_of_their_own_are_drawn_as_if_alone_and_equal_ones_share_batches(
    tiny_backbone: Backbone, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(dump_diffusers(replace(an_embedding("bad", 7), placeholder_token="<bad>")))
    config = tiny_config(tiny_model, tmp_path / "out", generation={"learned": [f"<worse>={bad}"]})
    store = RunStore(config.output)
    prompts = [
        Prompt("a {}", seed=1),
        Prompt("a {}", seed=1, negative="dark"),
        Prompt("a {}", seed=1, negative="dark {} and <worse>"),
        Prompt("a {}", seed=1, steps=3),
        Prompt("a {}", seed=1, guidance_scale=4.0),
        Prompt("a {}", seed=1, guidance_scale=1.0),
        Prompt("a {}", seed=1, guidance_scale=1.0, negative="dark"),
        Prompt("a {}", seed=1, negative="dark <unknown>"),
        Prompt("a {}", seed=1, size_px=(4096, 64)),
        Prompt("a {}", seed=1, size_px=(tiny_backbone.resolution,) * 2, carried='{"scene": 5}'),
        Prompt("a {}", seed=1, size_px=(2 * tiny_backbone.resolution, tiny_backbone.resolution)),
    ]
    rows = list(plan_rows(config, [learned(store, "a", 1), learned(store, "b", 2)], prompts))
    batches: list[tuple[int, int]] = []
    plain_draw = pipeline.bulk.drawer.draw

    def draw(encoder: Any, requests: Any, sampling: Any) -> Any:
        batches.append((sampling.steps, len(requests)))
        return plain_draw(encoder, requests, sampling)

    monkeypatch.setattr(pipeline.bulk.drawer, "draw", draw)
    drawer = Drawer(config)
    results = drawer(pa.Table.from_pylist(rows, PLAN_SCHEMA)).to_pylist()
    assert [row["row_id"] for row in results] == [row["row_id"] for row in rows]
    good = [0, 1, 2, 3, 4, 5, 9, 10]
    errors = [row["error"] or "" for row in results[: len(prompts)]]
    assert [bool(error) for error in errors] == [index not in good for index in range(len(prompts))], errors
    assert "'dark' has no effect without guidance" in errors[6]
    assert "<unknown> is no learned concept's placeholder token" in errors[7]
    assert "this model draws no pictures of 4096 x 64 px" in errors[8]
    size = config.generation.sampling.batch_size
    assert size >= 2
    assert sum(number for _, number in batches) == 2 * len(good)
    shared = 2 if drawing_is_invariant(tiny_backbone, config.generation.sampling) else 1  # as the CPU's kernels allow
    assert (3, shared) in batches, "the two concepts' rows of three steps are one batch"

    digests = [results[index]["sha256"] for index in good]
    assert len(set(digests)) == len(good) - 1, "all settings matter, but the model's own size does not"
    assert (results[0]["sha256"], results[9]["carried"]) == (results[9]["sha256"], '{"scene": 5}')
    assert (results[4]["guidance_scale"], results[2]["negative_prompt"]) == (4.0, "dark <a> and <worse>")
    for index in good:
        (alone,) = drawer(pa.Table.from_pylist([rows[index]], PLAN_SCHEMA)).to_pylist()
        assert alone["sha256"] == results[index]["sha256"], prompts[index]

    embedding, worse = an_embedding("a", 1), replace(an_embedding("bad", 7), placeholder_token="<worse>")
    request = ImageRequest("a <a>", 1, (embedding,), "dark <a> and <worse>", (embedding, worse))
    (expected,) = generate(tiny_backbone, [request], config.generation.sampling)
    assert to_png(expected) == store.get(results[2]["path"])

    bad.write_bytes(dump_diffusers(replace(an_embedding("bad", 8), placeholder_token="<bad>")))
    (changed,) = Drawer(config).draw([rows[2]], config.generation.sampling)
    assert "its concepts changed meanwhile" in str(changed)
