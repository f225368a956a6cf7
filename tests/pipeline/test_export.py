"""The command that writes concepts for other tools: what lies where, what is refused, and that it is all read back."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file
from transformers import CLIPTextModel

from pipeline import export
from pipeline.inputs.models import model_hash
from pipeline.ledger.records import ConceptRecord, StoredFile, put_record
from pipeline.sample_config import GridConfig
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_tree
from tests.tiny_models import DIM
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.formats import dump_diffusers
from textual_inversion.grids import grid
from textual_inversion.prompts import fill

FC1 = "encoder.layers.0.mlp.fc1"
RED = (200, 0, 0)
WEB = ("webui", "comfyui", "invoke", "kohya")


def learned(name: str, model: Path | str, kind: Any = "") -> LearnedEmbedding:
    generator = torch.Generator().manual_seed(len(name))
    rows = torch.randn(2, DIM, generator=generator)
    pair = torch.randn(2, DIM, generator=generator), torch.randn(2 * DIM, 2, generator=generator)
    return LearnedEmbedding(
        placeholder_token=f"<{name}>",
        vectors={"clip_l": rows},
        class_noun="big cat" if kind else "",
        adapter=LearnedAdapter(kind=kind, scale=1.5, tensors={FC1: pair}) if kind else None,
        metadata={"model": str(model), "model_hash": model_hash(str(model)) if Path(model).is_dir() else "h"},
    )


def put_concept(store: RunStore, embedding: LearnedEmbedding, **changes: Any) -> None:
    name = embedding.placeholder_token.strip("<>")
    record = ConceptRecord(
        concept_id=name,
        fingerprint=f"f-{name}",
        status="done",
        placeholder_token=embedding.placeholder_token,
        prompt_as=f"{embedding.placeholder_token} {embedding.class_noun}".strip(),
        images=("a.png", "b.png", "c.png"),
        num_vectors=2,
        finished_at="2026-01-01",
        **changes,
    )
    store.put(record.folder.embedding, dump_diffusers(embedding))
    if embedding.adapter:
        store.put(record.folder.adapter, dump_adapter(embedding))
    photos = [Image.new("RGB", (50, 40), "blue")] * 3
    labels = [fill(prompt, record.name_in_prompts) for prompt in GridConfig().prompts]
    sheet = grid(photos, [(label, [Image.new("RGB", (64, 64), RED)]) for label in labels])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    store.put(record.folder.grid, buffer.getvalue())
    put_record(store, record)


def put_settings(store: RunStore, model: Path | str, **changes: Any) -> None:
    tree = tiny_tree(model, **changes)
    tree["grid"] = {"images_per_prompt": 1}
    store.put("run.json", json.dumps({"config": tree}).encode())


@pytest.fixture
def run(root: str, tiny_model: Path) -> str:
    """A run of a plain concept, one with a LoRA, one with a causal adapter and one that failed, on each store."""
    store = RunStore(f"{root}/run")
    put_settings(store, tiny_model)
    put_concept(store, learned("tiger", tiny_model), scores={"clip_i": 0.75})
    put_concept(store, learned("taxi", tiny_model, "lora"), scores={"clip_i": 0.5, "clip_t": 0.25})
    put_concept(store, learned("causal", tiny_model, "causal"))
    failed = ConceptRecord(
        concept_id="broken", fingerprint="f-broken", status="failed", placeholder_token="<broken>", error="no photos"
    )
    put_record(store, failed)
    return store.root


def command(run: str, *arguments: str) -> tuple[int, RunStore]:
    to = f"{run.rpartition('/')[0]}/out"
    return export.main([run, "--to", to, *arguments]), RunStore(to)


def index(store: RunStore) -> dict[str, dict[str, Any]]:
    rows = read_table(io.BytesIO(store.get("index.parquet"))).to_pylist()
    return {row["concept_id"]: row for row in rows}


def test_each_tool_has_the_files_that_it_reads(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, store = command(run, "--for", ",".join((*WEB, "onetrainer", "diffusers", "peft")), "--only", "tiger,taxi")
    assert code == 1  # OneTrainer cannot have the adapter
    web = [f"{tool}/embeddings/{name}" for tool in WEB for name in ("taxi-ti", "tiger-ti")]
    assert set(store.list()) == {
        "README.md", "index.csv", "index.parquet",
        *(f"{name}.safetensors" for name in web), *(f"{name}.preview.png" for name in web),
        *(f"{tool}/loras/taxi-ti-lora.safetensors" for tool in WEB),
        "onetrainer/embeddings/tiger-ti.safetensors", "onetrainer/embeddings/tiger-ti.preview.png",
        "diffusers/tiger-ti/learned_embeds.safetensors", "diffusers/tiger-ti/tiger-ti.preview.png",
        "diffusers/taxi-ti/learned_embeds.safetensors", "diffusers/taxi-ti/pytorch_lora_weights.safetensors",
        "diffusers/taxi-ti/taxi-ti.preview.png",
        "peft/taxi-ti/learned_embeds.safetensors", "peft/taxi-ti/adapter_config.json",
        "peft/taxi-ti/adapter_model.safetensors", "peft/taxi-ti/taxi-ti.preview.png",
    }  # fmt: skip
    rows = learned("tiger", "x").vectors["clip_l"]
    for path, key in (
        ("webui/embeddings/tiger-ti", "emb_params"),
        ("onetrainer/embeddings/tiger-ti", "emp_params"),
        ("diffusers/tiger-ti/learned_embeds", "<tiger>"),
    ):
        tensors = load(store.get(f"{path}.safetensors"))
        assert list(tensors) == [key]
        assert torch.equal(tensors[key], rows)
    lora = load(store.get("kohya/loras/taxi-ti-lora.safetensors"))
    assert lora["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"].item() == 3.0
    told = capsys.readouterr()
    assert told.out.startswith("2 of 2 concepts exported, 31 files")
    assert told.err.count("REFUSED") == 1
    assert "REFUSED taxi: onetrainer: it was learned with an adapter" in told.err


def test_the_index_says_what_to_type_and_what_is_needed(run: str) -> None:
    _, store = command(run, "--for", ",".join((*WEB, "diffusers")))
    rows = index(store)
    assert list(rows) == ["causal", "taxi", "tiger"]
    tiger, taxi = rows["tiger"], rows["taxi"]
    assert {tool: tiger[f"word_{tool}"] for tool in (*WEB, "diffusers")} == {
        "webui": "tiger-ti", "comfyui": "embedding:tiger-ti", "invoke": "<tiger-ti>", "kohya": "tiger-ti",
        "diffusers": "<tiger>",
    }  # fmt: skip
    assert taxi["word_webui"] == "taxi-ti big cat <lora:taxi-ti-lora:1>"
    assert taxi["word_comfyui"] == "embedding:taxi-ti big cat"
    assert (tiger["needs_adapter"], taxi["needs_adapter"], taxi["adapter"]) == (False, True, "lora")
    assert (tiger["clip_i"], tiger["clip_t"], taxi["clip_t"]) == (0.75, None, 0.25)
    assert tiger["base_model"].endswith("model")
    assert len(tiger["model_hash"]) == 32
    assert set(tiger["files"]) | set(taxi["files"]) == set(store.list()) - {"README.md", "index.csv", "index.parquet"}
    written = list(csv.DictReader(io.StringIO(store.get("index.csv").decode())))
    assert [(row["name"], row["word_kohya"]) for row in written][1:] == [
        ("taxi-ti", "taxi-ti big cat"), ("tiger-ti", "tiger-ti"),
    ]  # fmt: skip
    assert written[2]["files"].split() == tiger["files"]
    card = store.get("README.md").decode()
    assert "# 2 learned concepts" in card
    assert "Learned by: the run `run`" in card
    assert run not in card
    assert "| `webui/` | AUTOMATIC1111, Forge, SD.Next | `taxi-ti big cat <lora:taxi-ti-lora:1>` |" in card


def test_the_preview_is_the_first_sample_picture(run: str) -> None:
    _, store = command(run, "--for", "webui", "--only", "tiger")
    picture = Image.open(io.BytesIO(store.get("webui/embeddings/tiger-ti.preview.png")))
    assert picture.size == (128, 128)
    assert picture.getcolors() == [(128 * 128, RED)]


def test_an_adapter_that_is_no_lora_is_never_written(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither are its rows alone: without the adapter they draw something else."""
    code, store = command(run, "--for", "webui,diffusers,peft,merged", "--only", "causal")
    assert code == 1
    assert set(store.list()) == {"README.md", "index.csv", "index.parquet"}
    assert "kind 'causal'" in index(store)["causal"]["refused"]
    told = capsys.readouterr().err
    assert told.count("REFUSED causal: ") == 4
    assert "recipe textboost-v1" in told
    assert "## Not exported" in store.get("README.md").decode()


def test_an_archive_holds_what_the_folder_would(run: str) -> None:
    _, folders = command(run, "--for", "webui,diffusers", "--only", "tiger,taxi")
    files = {path: folders.get(path) for path in folders.list() if "/" in path}
    before = index(folders)
    code, store = command(run, "--for", "webui,diffusers", "--only", "tiger,taxi", "--zip", "--overwrite")
    assert code == 0
    assert set(store.list()) == {"README.md", "index.csv", "index.parquet", "webui.zip", "diffusers.zip"}
    found = {}
    for tool in ("webui", "diffusers"):
        with zipfile.ZipFile(io.BytesIO(store.get(f"{tool}.zip"))) as archive:
            found |= {f"{tool}/{name}": archive.read(name) for name in archive.namelist()}
    assert found == files
    listed = index(store)["tiger"]
    assert [path.replace(".zip/", "/") for path in listed["files"]] == before["tiger"]["files"]
    assert listed["sha256"] == before["tiger"]["sha256"]
    once = store.get("webui.zip")
    command(run, "--for", "webui", "--only", "tiger,taxi", "--zip", "--overwrite")
    assert store.get("webui.zip") == once
    assert "diffusers.zip" not in store.list()
    command(run, "--for", "webui", "--only", "tiger", "--overwrite")
    assert set(store.list()) == {
        "README.md", "index.csv", "index.parquet", "webui/embeddings/tiger-ti.safetensors",
        "webui/embeddings/tiger-ti.preview.png",
    }  # fmt: skip


def test_an_earlier_export_is_replaced_only_when_asked(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "--for", "webui", "--only", "tiger,taxi")[0] == 0
    code, store = command(run, "--for", "webui", "--only", "tiger")
    assert code == 2
    assert "index.parquet is there already; give another --to, or --overwrite" in capsys.readouterr().err
    assert "webui/loras/taxi-ti-lora.safetensors" in store.list()
    store.put("webui/embeddings/mine.safetensors", b"of another origin")
    assert command(run, "--for", "webui", "--only", "tiger", "--overwrite")[0] == 0
    assert set(store.list()) == {
        "README.md", "index.csv", "index.parquet", "webui/embeddings/mine.safetensors",
        "webui/embeddings/tiger-ti.safetensors", "webui/embeddings/tiger-ti.preview.png",
    }  # fmt: skip


def test_the_same_concepts_give_the_same_bytes(run: str) -> None:
    _, store = command(run, "--for", "webui,peft", "--only", "taxi")
    once = {path: store.get(path) for path in store.list()}
    _, store = command(run, "--for", "webui,peft", "--only", "taxi", "--overwrite")
    assert {path: store.get(path) for path in store.list()} == once


def test_a_merged_text_encoder_is_a_folder_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_settings(store, tiny_model)
    taxi = learned("taxi", tiny_model, "lora")
    put_concept(store, taxi)
    code, _ = command(store.root, "--for", "merged")
    assert code == 0
    folder = tmp_path / "out" / "merged" / "taxi-ti"
    merged = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    plain = CLIPTextModel.from_pretrained(tiny_model, subfolder="text_encoder").state_dict()
    assert taxi.adapter is not None
    down, up = taxi.adapter.tensors[FC1]
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert [name.removeprefix("text_model.") for name in changed] == [f"{FC1}.weight"]
    torch.testing.assert_close(merged[changed[0]], plain[changed[0]] + 1.5 * up @ down)
    assert list(load_file(folder / "learned_embeds.safetensors")) == ["<taxi>"]


def test_a_model_that_has_changed_is_not_merged(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_settings(store, tiny_model)
    taxi = learned("taxi", tiny_model, "lora")
    put_concept(store, replace(taxi, metadata={**taxi.metadata, "model_hash": "old"}))
    assert command(store.root, "--for", "merged")[0] == 1
    assert "learned on another state of model" in capsys.readouterr().err


def test_only_what_passed_the_gate(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_settings(store, tiny_model, gate={"min_clip_i": 0.6})
    for name, score in (("good", 0.7), ("poor", 0.5)):
        put_concept(store, learned(name, tiny_model), scores={"clip_i": score})
    put_concept(store, learned("unscored", tiny_model))
    assert command(store.root, "--for", "webui", "--gate", "passed")[0] == 0
    assert list(index(RunStore(str(tmp_path / "out")))) == ["good"]
    assert command(store.root, "--for", "webui", "--gate", "passed", "--only", "poor", "--overwrite")[0] == 2
    assert "no learned concept that passed the gate" in capsys.readouterr().err


def test_a_stored_file_that_is_not_the_records_is_not_exported(tiny_model: Path, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_concept(store, learned("taxi", tiny_model))
    put_concept(store, learned("tiger", tiny_model))
    size = next(size for path, size in store.scan("concepts/tiger") if path.endswith("learned_embeds.safetensors"))
    for num_bytes, said in ((size, "SHA-256 digests differ"), (1, f"has {size:,} bytes and not the 1 of its record")):
        files = {"learned_embeds.safetensors": StoredFile(bytes=num_bytes, sha256="0" * 64)}
        put_concept(store, learned("tiger", tiny_model), files=files)
        code, out = command(store.root, "--for", "webui", "--overwrite")
        assert code == 1
        assert said in index(out)["tiger"]["refused"]
        assert index(out)["taxi"]["files"]


def test_a_grid_of_other_settings_is_shown_whole(tiny_model: Path, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_concept(store, learned("tiger", tiny_model))
    store.put("run.json", json.dumps({"config": tiny_tree(tiny_model)}).encode())
    _, out = command(store.root, "--for", "webui")
    picture = Image.open(io.BytesIO(out.get("webui/embeddings/tiger-ti.preview.png")))
    assert max(picture.size) == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "webui,comfy"], "--for webui,comfy: 'comfy' is none of webui, comfyui, invoke"),
        (["--for", ","], "--for ,: name webui"),
        (["--for", "webui", "--only", "tigre"], "no concept 'tigre' in .*did you mean tiger"),
        (["--for", "webui", "--only", "broken"], "concept 'broken' was not learned: no photos"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    store = RunStore(str(tmp_path / "run"))
    put_concept(store, learned("tiger", tiny_model))
    failed = ConceptRecord(
        concept_id="broken", fingerprint="f-broken", status="failed", placeholder_token="<broken>", error="no photos"
    )
    put_record(store, failed)
    assert command(store.root, *arguments)[0] == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert export.main([str(tmp_path / "nothing"), "--for", "webui", "--to", str(tmp_path / "out")]) == 2
    assert "no concepts there; give the output of a run" in capsys.readouterr().err


def test_an_export_is_uploaded_when_asked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a private repository: nobody has said yet under which licence."""
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            assert commit_message
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    store = RunStore(str(tmp_path / "run"))
    put_concept(store, learned("tiger", tiny_model))
    assert command(store.root, "--for", "kohya", "--push", "me/words")[0] == 0
    listed = ["README.md", "index.csv", "index.parquet", "kohya"]
    assert calls == [("me/words", True, True), ("me/words", listed)]
    assert export.main([store.root, "--for", "kohya", "--to", "memory://x", "--push", "me/words"]) == 2
    assert "--push uploads a folder of this machine; memory://x is none" in capsys.readouterr().err
