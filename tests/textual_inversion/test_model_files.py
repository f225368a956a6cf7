"""Which files count as the model, and that their digest changes when and only when they do; without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from textual_inversion.model_files import find_model_files, model_hash


def a_model(directory: Path, half: bool = False) -> Path:
    """The bare layout: no tensors are read here, so any bytes will do for weights."""
    variant = ".fp16" if half else ""
    files = {
        "unet/config.json": "{}",
        f"unet/diffusion_pytorch_model{variant}.safetensors": "unet weights",
        "text_encoder/config.json": "{}",
        f"text_encoder/model{variant}.safetensors": "text weights",
        "tokenizer/vocab.json": "{}",
        "tokenizer/merges.txt": "a b",
        "scheduler/scheduler_config.json": '{"prediction_type": "epsilon"}',
        "safety_checker/model.safetensors": "not ours",
        "README.md": "hello",
    }
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    components = {name: ["library", "Class"] for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
    index = {"_class_name": "StableDiffusionPipeline", **components, "image_encoder": [None, None]}
    index["safety_checker"] = ["library", "Class"]
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def edit_index(model: Path, **changes: object) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_hash_does_not_depend_on_where_the_model_lies(tmp_path: Path) -> None:
    first = a_model(tmp_path / "a")
    again = shutil.copytree(first, tmp_path / "somewhere/else")
    assert model_hash(str(first)) == model_hash(str(again))
    assert len(model_hash(str(first))) == 32


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "tokenizer/merges.txt"]
)
def test_the_hash_changes_with_each_file_that_matters(tmp_path: Path, name: str) -> None:
    model = a_model(tmp_path / "a")
    before = model_hash(str(model))
    (model / name).write_text("changed")
    assert model_hash(str(model)) != before


def test_the_hash_changes_with_the_classes_and_settings_of_the_index(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    hashes = [model_hash(str(model))]
    for changes in ({"_class_name": "Other"}, {"unet": ["library", "Other"]}, {"force_zeros_for_empty_prompt": False}):
        edit_index(model, **changes)
        hashes.append(model_hash(str(model)))
    assert len(set(hashes)) == 4


def test_the_hash_ignores_what_is_not_used(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    before = model_hash(str(model))
    (model / "README.md").write_text("changed")
    edit_index(model, _diffusers_version="9.9", _name_or_path="elsewhere", safety_checker=[None, None])
    (model / "safety_checker/model.safetensors").write_text("changed")
    (model / "unet/diffusion_pytorch_model.bin").write_text("the same weights, pickled")
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_text("the same weights, in half")
    assert model_hash(str(model)) == before


def test_variants_are_chosen_only_where_plain_files_are_missing(tmp_path: Path) -> None:
    assert find_model_files(str(a_model(tmp_path / "plain"))).variants == {"unet": None, "text_encoder": None}
    half = find_model_files(str(a_model(tmp_path / "half", half=True)))
    assert half.variants == {"unet": "fp16", "text_encoder": "fp16"}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in half.names


def test_shards_are_part_of_the_model(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    for i in (1, 2):
        (model / f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors").write_text(f"shard {i}")
    (model / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert sum("-of-00002" in name for name in find_model_files(str(model)).names) == 2


def test_a_folder_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    shutil.rmtree(model / "unet")
    with pytest.raises(ValueError, match="'unet', but it has no such folder"):
        find_model_files(str(model))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        find_model_files(str(tmp_path))
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        find_model_files("/no/such/directory")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo/model", r"'demo/model' is one of the demo's, .* in no installed package; name a model \(--model\)"),
        ("models/mine", "the folder 'models' is here, but has no 'mine'"),
        ("models/a/b", "neither a directory here nor a hub id"),
        ("./mine", "the folder '.' is here"),
        ("mine", "neither a directory here nor a hub id"),
    ],
)
def test_no_path_is_looked_up_on_the_hub(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_model_files(name)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_local_cache(hub_cache: Path, tmp_path: Path) -> None:
    repository, commit = hub_cache / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    snapshot = a_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    assert find_model_files("owner/name").directory == snapshot
    assert model_hash("owner/name") == model_hash(str(a_model(tmp_path / "a")))
    assert find_model_files(f"owner/name@{commit}").directory == snapshot


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_that_cannot_be_had_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"'owner/nothing' is no directory here and cannot be downloaded from the hub"):
        find_model_files("owner/nothing")


def test_hashing_imports_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    code = (
        f"import sys; from textual_inversion.model_files import model_hash; model_hash({str(model)!r}); "
        "import textual_inversion; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
