"""The Jobs that fill the models' volume, from the hub or from a bucket, fetch what the pipeline loads of them, and not
the rest."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from tests.k8s.render import K8S, only, render
from tests.pipeline.s3_server import S3Server
from textual_inversion import model_files

STABLE_DIFFUSION = [
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
]
"""Some of the hub repository's files: every one that is needed, and one of each kind that is not."""

COMPONENTS = {
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def test_fetches_what_is_loaded(tmp_path: Path) -> None:
    (container,) = only(render("model-cache"), "Job")["spec"]["template"]["spec"]["initContainers"]
    patterns = [a.removeprefix("--include=") for a in container["command"] if a.startswith("--include=")]
    fetched = {name for name in STABLE_DIFFUSION if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    for name in fetched:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | COMPONENTS))
    found = model_files.find_model_files(str(tmp_path))
    assert set(found.variants) == {"text_encoder", "unet", "vae"}
    assert fetched - set(found.names) == {"model_index.json", "safety_checker/config.json"}
    assert set(found.names) == {
        name
        for name in STABLE_DIFFUSION
        if name.partition("/")[0] in COMPONENTS
        and not name.startswith("safety_checker")
        and not name.endswith(".bin")
        and "fp16" not in name
        and "non_ema" not in name
    }


def test_every_download_has_a_revision() -> None:
    pod = only(render("model-cache"), "Job")["spec"]["template"]["spec"]
    for container in pod["initContainers"] + pod["containers"]:
        (revision,) = [a.partition("=")[2] for a in container["command"] if a.startswith("--revision=")]
        assert len(revision) == 40
        assert int(revision, 16)
        assert not any(entry["name"] == "HF_HUB_OFFLINE" for entry in container["env"])


@pytest.mark.slow
def test_fills_from_a_bucket(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """As the Job calls it: what is loaded is fetched once, and what was cut short again."""
    (container,) = only(render("model-cache-s3"), "Job")["spec"]["template"]["spec"]["initContainers"]
    python, script, address, target = container["command"]
    assert (python, script) == ("python", "/etc/fill/fetch.py")
    fs = fsspec.filesystem("s3", **s3_server.options)
    source = address.replace("s3://example-bucket", bucket)
    for name in STABLE_DIFFUSION:
        fs.pipe_file(f"{source}/{name}", name.encode())
    copy = tmp_path / target.lstrip("/")

    def fill(uri: str) -> tuple[int, str]:
        command = [sys.executable, str(K8S / "model-cache-s3/fetch.py"), uri, str(copy)]
        environment = os.environ | s3_server.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    wanted = {name for name in STABLE_DIFFUSION if not name.endswith((".bin", ".ckpt", ".md"))}
    assert fill(source) == (0, f"{copy}: {len(wanted)} files fetched, 0 there before\n")
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == wanted
    (copy / "unet/config.json").write_text("cut")
    assert fill(source) == (0, f"{copy}: 1 files fetched, {len(wanted) - 1} there before\n")
    assert (copy / "unet/config.json").read_text() == "unet/config.json"
    code, said = fill(f"{bucket}/nothing")
    assert (code, "no .safetensors file" in said) == (2, True)
