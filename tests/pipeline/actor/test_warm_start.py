from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.actor import warm_start
from pipeline.actor.warm_start import load_examples
from pipeline.config import PhotoConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.ledger.records import ConceptRecord, StoredFile, load_records, put_record
from pipeline.store.storage import RunStore
from tests.pipeline.runs import write_photo
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import dump_diffusers


def put_concept(store: RunStore, name: str, photos: tuple[str, ...], model: str = "this") -> None:
    embedding = LearnedEmbedding(
        placeholder_token=f"<{name}>", vectors={"clip_l": torch.full((1, 4), float(len(name)))},
        metadata={"model_hash": model},
    )  # fmt: skip
    record = ConceptRecord(
        concept_id=name,
        fingerprint=hashlib.md5(name.encode()).hexdigest(),
        status="done",
        placeholder_token=f"<{name}>",
        images=photos,
    )
    store.put(record.folder.embedding, dump_diffusers(embedding))
    put_record(store, record)


def test_what_an_earlier_run_learned_and_from_what(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "before"))
    photos = write_photo(tmp_path / "a.png", 1), write_photo(tmp_path / "b.png", 2)
    put_concept(store, "toy", photos)
    put_concept(store, "gone", (*photos, str(tmp_path / "gone.png")))
    put_concept(store, "other", photos, model="another")
    put_concept(store, "clock", photos[:1])
    clock, toy = load_examples(str(tmp_path / "before"), "this", PhotoConfig())
    assert torch.equal(clock.embedding.vectors["clip_l"], torch.full((1, 4), 5.0))
    assert (len(clock.photos), len(toy.photos)) == (1, 2)
    with pytest.raises(ValueError, match="none of its 4 concepts was learned by this model"):
        list(load_examples(str(tmp_path / "before"), "a third", PhotoConfig()))


def test_an_example_is_what_its_record_vouches_for(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "before"))
    photo, other = write_photo(tmp_path / "a.png", 1), write_photo(tmp_path / "b.png", 2)
    put_concept(store, "clock", (photo,))
    put_concept(store, "toy", (other,))
    for record in list(load_records(store)):
        data = store.get(record.folder.embedding)
        files = {"learned_embeds.safetensors": StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
        hashes = list(content_hashes(record.images).values())
        put_record(store, replace(record, files=files, inputs={"images": hashes}))
    write_photo(tmp_path / "b.png", 3)
    (clock,) = load_examples(str(tmp_path / "before"), "this", PhotoConfig())
    assert clock.embedding.placeholder_token == "<clock>"

    (path,) = (each for each in store.list("concepts/clock") if each.endswith(".safetensors"))
    store.put(path, store.get(path).replace(b"this", b"that"))
    with pytest.raises(ValueError, match=r"learned_embeds\.safetensors is not the file that its record names"):
        list(load_examples(str(tmp_path / "before"), "that", PhotoConfig()))


def test_many_are_thinned_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(str(tmp_path / "before"))
    photo = write_photo(tmp_path / "a.png", 1)
    for i in range(9):
        put_concept(store, f"c{i}", (photo,))
    monkeypatch.setattr(warm_start, "MAX_EXAMPLES", 3)
    examples = load_examples(str(tmp_path / "before"), "this", PhotoConfig())
    assert [example.embedding.placeholder_token for example in examples] == ["<c0>", "<c3>", "<c6>"]
