"""Which learned concepts a command finds, in runs and in plain files, and what it says when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.actor.library import Library, open_library
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.store.storage import RunStore
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.formats import dump_diffusers


def record(name: str, **changes: object) -> ConceptRecord:
    done = ConceptRecord(
        concept_id=name, fingerprint=f"f-{name}", status="done", placeholder_token=f"<{name}>",
        images=(f"/photos/{name}.png",), finished_at="2026-01-01",
    )  # fmt: skip
    return replace(done, **changes)  # type: ignore[arg-type]


def put_learned(store: RunStore, done: ConceptRecord, value: float = 0.5) -> None:
    rows = torch.full((2, 8), value)
    store.put(
        done.folder.embedding,
        dump_diffusers(LearnedEmbedding(placeholder_token=done.placeholder_token, vectors={"clip_l": rows})),
    )
    put_record(store, done)


def a_run(root: str, *names: str) -> str:
    for name in names:
        put_learned(RunStore(root), record(name))
    return root


def test_concepts_of_a_run_by_id_and_by_word(root: str) -> None:
    library = open_library([a_run(root, "cat", "dog")])
    cat = library.named("cat")
    assert library.named("<cat>") == cat
    assert (cat.name, cat.placeholder_token, cat.images) == ("cat", "<cat>", ("/photos/cat.png",))
    assert cat.read().vectors["clip_l"].tolist() == [[0.5] * 8] * 2
    assert [concept.name for concept in library.in_prompt("a <dog>, a <cat> and a <dog>")] == ["dog", "cat"]
    assert library.in_prompt("a cat and a dog") == ()
    assert library.knows("dog")
    assert not library.knows("horse")


def test_a_concept_is_named_as_it_was_learned(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    put_learned(store, record("cat", prompt_as="<cat> stuffed toy"))
    put_learned(store, record("old"))  # of a release that kept no such name
    library = open_library([str(tmp_path)])
    assert library.named("cat").name_in_prompts == "<cat> stuffed toy"
    assert library.named("old").name_in_prompts == "<old>"

    rows = LearnedEmbedding(placeholder_token="<cat>", vectors={"clip_l": torch.ones(1, 8)}, class_noun="stuffed toy")
    path = tmp_path / "cat.safetensors"
    path.write_bytes(dump_diffusers(rows))
    assert open_library([str(path)]).named("cat").name_in_prompts == "<cat> stuffed toy"
    mine = open_library([f"<mine>={path}"]).named("cat")
    assert mine.name_in_prompts == "<mine> stuffed toy"
    assert mine.read().class_noun == "stuffed toy"


def test_of_a_concept_learned_twice_the_later_counts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    put_learned(store, record("cat"))
    put_learned(store, record("cat", fingerprint="other", finished_at="2026-01-02"))
    assert open_library([str(tmp_path)]).named("cat").uri.endswith("/cat/other/learned_embeds.safetensors")


def test_an_adapter_comes_with_its_embedding(root: str) -> None:
    store, done = RunStore(root), record("cat")
    adapter = LearnedAdapter(kind="causal", scale=0.5, tensors={"encoder.q_proj": (torch.ones(2, 8), torch.ones(8, 2))})
    embedding = LearnedEmbedding(placeholder_token="<cat>", vectors={"clip_l": torch.ones(1, 8)}, adapter=adapter)
    store.put(done.folder.embedding, dump_diffusers(embedding))
    put_record(store, done)
    cat = open_library([root]).named("cat")
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors cannot be used: .*adapter.safetensors"):
        cat.read()
    store.put(done.folder.adapter, dump_adapter(embedding))
    found = cat.read().adapter
    assert found is not None
    assert (found.kind, found.scale) == ("causal", 0.5)


def test_files_of_any_tool(tmp_path: Path) -> None:
    for name, key in (("ours", "<ours>"), ("a1111", "emb_params"), ("plain", "plain-word")):
        save_file({key: torch.ones(2, 8)}, tmp_path / f"{name}.safetensors")
    library = open_library(
        [str(tmp_path / "ours.safetensors"), str(tmp_path / "a1111.safetensors"), f"mine={tmp_path}/plain.safetensors"]
    )
    assert [concept.placeholder_token for concept in library.concepts] == ["<ours>", "a1111", "mine"]
    assert library.named("plain").read().placeholder_token == "mine"
    assert [concept.name for concept in library.in_prompt("a mine and a1111")] == ["plain", "a1111"]

    torch.save({"string_to_param": {"*": torch.ones(8)}, "name": "other"}, tmp_path / "old.ti.pt")
    (old,) = open_library([str(tmp_path / "old.ti.pt")]).concepts
    assert (old.name, old.placeholder_token, len(old.read().vectors["clip_l"])) == ("old.ti", "old.ti", 1)
    torch.save({"emp_params": torch.ones(2, 8)}, tmp_path / "two words.bin")
    assert open_library([f"<w>={tmp_path}/two words.bin"]).named("<w>").read().placeholder_token == "<w>"


def test_what_cannot_be_found_is_said_with_a_remedy(tmp_path: Path) -> None:
    root = a_run(str(tmp_path / "run"), "tiger", "taxi")
    put_record(RunStore(root), record("broken", status="failed", error="no photos"))
    library = open_library([root])
    with pytest.raises(ValueError, match=r"no learned concept is named 'tigre'; there are 2, such as tiger"):
        library.named("tigre")
    with pytest.raises(ValueError, match="'broken' was not learned: no photos"):
        library.named("broken")
    with pytest.raises(ValueError, match=r"'a <taxy>': <taxy> is no learned concept's .*; the known ones are <taxi>"):
        library.in_prompt("a <taxy>")
    with pytest.raises(ValueError, match="no --learned was given"):
        Library([]).in_prompt("a <taxi>")


def test_a_name_of_two_is_not_guessed(tmp_path: Path) -> None:
    first, second = a_run(str(tmp_path / "1"), "cat"), a_run(str(tmp_path / "2"), "cat")
    library = open_library([first, second])
    for ask in (library.named, library.in_prompt):
        with pytest.raises(ValueError, match=r"'<cat>' is the name of 2 learned concepts .*--learned '<my-word>=/"):
            ask("<cat>")
    one = open_library([f"<a>={library.concepts[0].uri}", second])
    assert one.named("<a>").uri.startswith(first)
    assert one.named("<cat>").uri.startswith(second)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no concepts there; give the output folder of a run"),
        ("nowhere.safetensors", "nowhere.safetensors cannot be used: .*No such file"),
        ("bad.safetensors", "bad.safetensors cannot be used: not a safetensors file"),
        ("bad.pt", "bad.pt cannot be used: not a safetensors file"),
        ("two.safetensors", "two.safetensors cannot be used: it holds 2 embeddings"),
        ("two words.pt", "name 'two words' is not one word; give it a word: --learned '<my-word>=/.*/two words.pt'"),
    ],
)
def test_bad_sources(tmp_path: Path, source: str, message: str) -> None:
    for name in ("bad.safetensors", "bad.pt"):
        (tmp_path / name).write_bytes(b"no")
    torch.save({"emb_params": torch.ones(1, 8)}, tmp_path / "two words.pt")
    save_file({"a": torch.ones(1, 8), "b": torch.ones(1, 8)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=message):
        open_library([str(tmp_path / source)])
