from __future__ import annotations

import os
import shutil
from pathlib import Path

import fsspec
import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs import models
from pipeline.inputs.models import (
    CAPTIONS_FILE,
    ROOT,
    check_init_encoder,
    check_model,
    locate,
    portable,
    with_captions,
)
from pipeline.ledger.settings import captions_hash, current_settings
from pipeline.store.addresses import MAX_BYTES, read_beginning

PRESERVED = ["inversion.adapter.kind=lora", "inversion.penalties.knowledge=0.1"]


def captions(config: RunConfig) -> str:
    return with_captions(config).inversion.penalties.captions


def test_the_demo_models_captions_are_those_of_its_world() -> None:
    assert captions(load_config(overrides=PRESERVED)) == str(ROOT / "demo/model" / CAPTIONS_FILE)
    elsewhere = load_config(overrides=[*PRESERVED, f"model={ROOT / 'demo/model'}"])
    assert captions(elsewhere) == captions(load_config(overrides=PRESERVED))


def test_without_knowledge_preservation_there_are_none() -> None:
    assert with_captions(RunConfig()) == RunConfig()


def test_a_model_without_captions_leaves_the_package_its_own(tmp_path: Path) -> None:
    assert captions(load_config(overrides=[*PRESERVED, f"model={tmp_path}"])) == ""
    assert captions(load_config(overrides=[*PRESERVED, "model=owner/name"])) == ""


def test_captions_that_are_named_go_first() -> None:
    config = load_config(overrides=[*PRESERVED, "inversion.penalties.captions=mine.txt"])
    assert captions(config) == "mine.txt"


def test_the_models_captions_count_by_content_where_they_are_used(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    given = [f"model={model}", "extractor="]
    plain, preserved = load_config(overrides=given), load_config(overrides=[*given, *PRESERVED])
    before = current_settings(plain)
    assert current_settings(preserved)["inversion"]["penalties"]["captions"] == ""
    path = model / CAPTIONS_FILE
    hashes = []
    for text in ("a cat\n", "a dog\n"):
        path.write_text(text)
        hashes.append(current_settings(preserved)["inversion"]["penalties"]["captions"])
        assert hashes[-1] == captions_hash(str(path))
    assert len({"", *hashes}) == 3
    assert current_settings(plain) == before


def test_text_encoders_that_the_model_does_not_have_are_refused(tiny_model: Path) -> None:
    def check(encoders: str) -> None:
        check_model(load_config(overrides=[f"model={tiny_model}", "extractor=", f"inversion.text_encoders={encoders}"]))

    check("[]")
    check('["clip_l"]')
    with pytest.raises(ValueError, match=r"inversion\.text_encoders names 't5xxl', but .* text encoders are clip_l"):
        check('["clip_l", "t5xxl"]')


def test_a_file_at_an_address_is_copied_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fsspec.filesystem("memory").pipe_file("/models/mine.safetensors", b"x")
    address = "memory://models/mine.safetensors"
    assert Path(locate(address)).read_bytes() == b"x"
    assert portable(address) == address
    with pytest.raises(ValueError, match=r"model memory://models/absent\.safetensors cannot be fetched: FileNotFound"):
        locate("memory://models/absent.safetensors")


def test_a_file_is_a_path_and_never_a_hub_id(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models/mine.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert locate("models/mine.safetensors") == portable("models/mine.safetensors") == str(path)
    with pytest.raises(ValueError, match=r"mine\.safetensors is no safetensors file"):
        check_model(load_config(overrides=["model=models/mine.safetensors"]))
    with pytest.raises(ValueError, match="there is no such file"):
        check_model(load_config(overrides=["model=models/absent.safetensors"]))
    assert locate("owner/name") == portable("owner/name") == "owner/name"
    assert portable(str(tiny_model)) == str(tiny_model)


DEMO_ENCODER = ROOT / "demo" / "encoder" / "encoder.safetensors"


def test_an_encoder_of_this_model_and_extractor_is_a_start() -> None:
    check_init_encoder(load_config(overrides=[f"inversion.init.encoder={DEMO_ENCODER}"]))
    own = [f"inversion.init.encoder={DEMO_ENCODER}", "inversion.init.extractor=demo/clip", "extractor=''"]
    check_init_encoder(load_config(overrides=own))
    check_init_encoder(load_config(overrides=["inversion.init.encoder=gone", "inversion.init.method=words"]))


def test_an_encoder_is_read_up_to_the_end_of_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header beyond what is read at once is that of an encoder of very many categories."""
    asked: list[int] = []

    def reading(uri: str, num_bytes: int, limit: int) -> bytes:
        asked.append(num_bytes)
        return read_beginning(uri, num_bytes, limit)

    monkeypatch.setattr(models, "read_beginning", reading)
    data = DEMO_ENCODER.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * 100_000
    (tmp_path / "many.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    check_init_encoder(load_config(overrides=[f"inversion.init.encoder={DEMO_ENCODER}"]))
    check_init_encoder(load_config(overrides=[f"inversion.init.encoder={tmp_path}/many.safetensors"]))
    assert asked == [2**16, 2**16, 8 + len(header)]
    assert max(asked) < len(data)


def test_an_encoder_may_be_larger_than_a_photo(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    shutil.copy(DEMO_ENCODER, path)
    os.truncate(path, MAX_BYTES + 1)
    config = load_config(overrides=[f"inversion.init.encoder={path}"])
    check_init_encoder(config)
    assert current_settings(config)["inversion"]["init"]["encoder"]


def test_an_encoder_that_no_actor_could_use_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(DEMO_ENCODER.read_bytes()[:1000])
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    embedding = ROOT / "demo" / "clip" / "model.safetensors"
    encoder = f"inversion.init.encoder={DEMO_ENCODER}"
    for overrides, reason in (
        ([encoder, f"model={tiny_model}"], "trained for another model .* train an encoder for this one"),
        ([encoder, "inversion.init.extractor=demo/moco"], "trained for another extractor"),
        ([f"inversion.init.encoder={tmp_path}/cut.safetensors"], "not a safetensors file; it was cut short"),
        ([f"inversion.init.encoder={tmp_path}/list.safetensors"], "not a safetensors file"),
        ([f"inversion.init.encoder={embedding}"], "no file of an encoder"),
        ([f"inversion.init.encoder={tmp_path}/gone.safetensors"], "gone.safetensors"),
    ):
        with pytest.raises(ValueError, match=rf"inversion\.init\.encoder = .*{reason}"):
            check_init_encoder(load_config(overrides=overrides))
