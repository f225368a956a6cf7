"""The Job that fills the models' volume fetches what the pipeline loads of them, and not the rest."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from tests.k8s.render import only, render
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
