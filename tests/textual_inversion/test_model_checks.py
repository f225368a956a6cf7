"""Models that cannot be used are refused from JSON and the headers of weight files, with a cause, before they load."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from textual_inversion.families import check_model, load_vocabularies

UNET = "unet/diffusion_pytorch_model.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture
def a_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def config(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def unet(**changes: Any) -> Callable[[Path], None]:
    return config("unet/config.json", **changes)


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return config("scheduler/scheduler_config.json", **changes)


def index(**changes: Any) -> Callable[[Path], None]:
    return config("model_index.json", **changes)


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / file).write_text(content) and None


def lacking(file: str, name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        weights = load_file(model / file)
        del weights[name]
        save_file(weights, model / file)

    return change


def with_nan(model: Path) -> None:
    weights = load_file(model / UNET)
    weights["conv_in.weight"] = np.full_like(weights["conv_in.weight"], np.nan)
    save_file(weights, model / UNET)


def cut_short(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-10])


def in_shards(model: Path) -> None:
    """Split the U-Net's weights into two files, as the libraries write large ones, with their index."""
    weights = load_file(model / UNET)
    (model / UNET).unlink()
    places = {}
    for i in range(2):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = dict(sorted(weights.items())[i::2])
        save_file(part, model / "unet" / name)
        places |= dict.fromkeys(part, name)
    (model / f"{UNET}.index.json").write_text(json.dumps({"weight_map": places}))


def in_shards_but_one(model: Path) -> None:
    in_shards(model)
    (model / "unet/diffusion_pytorch_model-00001-of-00002.safetensors").unlink()


def in_shards_without_index(model: Path) -> None:
    in_shards(model)
    (model / f"{UNET}.index.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        in_shards,
        scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        scheduler(trained_betas=[0.001] * 1000),
    ],
)
def test_a_good_model_passes(a_copy: Path, change: Callable[[Path], None]) -> None:
    change(a_copy)
    check_model(str(a_copy))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (text(UNET, LFS_POINTER), r"unet/diffusion_pytorch_model\.safetensors .*pointer of Git LFS"),
        (text("unet/config.json", LFS_POINTER), r"unet/config\.json .*pointer of Git LFS"),
        (text("model_index.json", LFS_POINTER), r"model_index\.json .*pointer of Git LFS"),
        (text("model_index.json", "["), r"model_index\.json cannot be read"),
        (text("model_index.json", "[]"), r"model_index\.json cannot be read: it is no JSON object"),
        (index(_class_name=["pipeline", "Mine"]), "code that comes with a model is never run"),
        (index(unet=["my_unet", "MyUNet"]), "names MyUNet as 'unet'; UNet2DConditionModel is needed"),
        (index(unet=["diffusers", "U\x7fNet"]), r"names U\\x7fNet as 'unet'; UNet2DConditionModel is needed"),
        (cut_short, "header speaks of"),
        (with_nan, r"'conv_in\.weight' in 'unet' has values that are NaN"),
        (lacking(UNET, "mid_block.resnets.0.conv1.weight"), r"have no 'mid_block\.resnets\.0\.conv1\.weight'"),
        (lacking(UNET, "conv_out.bias"), r"have no 'conv_out\.bias'"),
        (in_shards_but_one, r"places 'conv_in\.bias' in .*-00001-of-00002\.safetensors, which is missing"),
        (in_shards_without_index, "weights in several files, but no index"),
        (unet(layers_per_block=2), r"have no 'down_blocks\.0\.resnets\.1\.conv1\.weight', which its config\.json"),
        (
            unet(layers_per_block=10**9),
            r"'unet' have \d+ tensors, but its config\.json says 1000000000 in layers_per_b",
        ),
        (unet(transformer_layers_per_block=[1, [10**9]]), "says 1000000000 in transformer_layers_per_block"),
        (config("vae/config.json", layers_per_block=10**9), r"'vae' have \d+ tensors, .* 1000000000 in layers_per_bl"),
        (unet(in_channels=9), "takes 9 channels but the autoencoder has 4"),
        (unet(in_channels=5), "takes 5 channels but the autoencoder has 4"),
        (unet(out_channels=8), "returns 8 channels"),
        (unet(class_embed_type="timestep"), "class_embed_type is 'timestep': it reads more than a prompt"),
        (unet(time_cond_proj_dim=256), "reads the guidance scale"),
        (unet(cross_attention_dim=64), "reads text states of width 64 but the text encoder makes 32"),
        (config("text_encoder/config.json", num_hidden_layers=3), "have 2 layers, but its config.json says 3"),
        (scheduler(prediction_type="sample"), "prediction_type 'sample'"),
        (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "rectified flow"),
        (scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr with prediction_type 'epsilon'"),
        (scheduler(trained_betas=[0.1]), "1 trained_betas for 1000 timesteps"),
        (lambda model: shutil.rmtree(model / "scheduler"), "names 'scheduler', but it has no such folder"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_cause(
    a_copy: Path, change: Callable[[Path], None], problem: str
) -> None:
    change(a_copy)
    with pytest.raises(ValueError, match=problem) as error:
        check_model(str(a_copy))
    assert str(a_copy) in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "unet/config.json"])
@pytest.mark.parametrize("content", ['"[["', "[]", "null", '{"down_block_types": 7, "model": 7}'])
def test_any_json_in_place_of_a_file_names_the_model(file: str, content: str, a_copy: Path) -> None:
    """Found by the fuzzing command: a text and a list where an object belongs."""
    (a_copy / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(a_copy))) as caught:
        load_vocabularies(str(a_copy))
    assert str(caught.value).isprintable()


def test_another_pipelines_model_is_refused_with_the_families_that_are_here(a_copy: Path) -> None:
    index(_class_name="StableDiffusionInpaintPipeline")(a_copy)
    with pytest.raises(ValueError, match="is a StableDiffusionInpaintPipeline; families known here: ") as error:
        check_model(str(a_copy))
    for known in ("StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)", "StableDiffusionXLPipeline"):
        assert known in str(error.value)
    assert "\n" not in str(error.value)


def test_checking_imports_neither_torch_nor_diffusers(tiny_model: Path) -> None:
    code = (
        f"import sys; from textual_inversion.families import check_model; check_model({str(tiny_model)!r}); "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
