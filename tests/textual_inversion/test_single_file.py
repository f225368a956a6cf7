"""Checkpoints in one file: what they are, where their configurations come from, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizerFast

from tests.original_layout import save_in_one_file
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from textual_inversion import model_files
from textual_inversion.families import check_model, load_backbone, load_vocabularies
from textual_inversion.families.base import stack_prompts
from textual_inversion.model_files import find_model_files, model_hash
from textual_inversion.prompts import encode_prompt
from textual_inversion.single_file import complete_tokenizer, configurations
from textual_inversion.tokenizer import read_tokenizer

UNET = "model.diffusion_model."
FIRST, STATES = f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def a_file(path: Path, *names: str, channels: int = 4, width: int = 768, **metadata: str) -> Path:
    """Save a file with a few weights of a U-Net, and empty tensors of these names."""
    weights = {FIRST: torch.zeros(1, channels, 3, 3), STATES: torch.zeros(1, width)}
    save_file(weights | {name: torch.zeros(0) for name in names}, path, metadata=metadata)
    return path


def without_weights(model: Path, directory: Path) -> Path:
    return Path(shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(params=["sd", "sdxl"])
def both(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Give a tiny model in the diffusers layout, and the same in one file beside its configurations."""
    model = tiny_model if request.param == "sd" else tiny_stable_diffusion_xl(tmp_path / "xl")
    beside = without_weights(model, tmp_path / "single")
    return model, save_in_one_file(model, beside / "model.safetensors")


def outputs(model: Path) -> dict[str, Any]:
    """Return what a model computes: the denoiser's output, moments of a picture, and a decoded picture."""
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    ids = stack_prompts([encode_prompt("a photo of a cat", {}, backbone.vocabularies)])
    conditioning = backbone.encode_prompts(ids, {})
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *backbone.latent_shape, generator=generator)
    pixels = torch.rand(1, 3, backbone.resolution, backbone.resolution, generator=generator) * 2 - 1
    return {
        "states": conditioning.hidden,
        "prediction": backbone.predict(latents, torch.tensor([500]), conditioning),
        "moments": backbone.encode_images(pixels),
        "pixels": backbone.decode(latents),
    }


def test_a_model_in_one_file_computes_what_it_computes_in_the_diffusers_layout(both: tuple[Path, Path]) -> None:
    model, file = both
    check_model(str(file))
    assert load_vocabularies(str(file)).keys() == load_vocabularies(str(model)).keys()
    plain, single = outputs(model), outputs(file)
    for name, expected in plain.items():
        # not to the bit: a kernel's rounding depends on where in memory the weights begin
        torch.testing.assert_close(single[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_the_hash_changes_with_the_file_and_with_its_configurations(both: tuple[Path, Path]) -> None:
    model, file = both
    hashes = {model_hash(str(model)), model_hash(str(file))}
    scheduler = file.parent / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    hashes.add(model_hash(str(file)))
    weights = load_file(file)
    save_file({**weights, FIRST: weights[FIRST] + 1}, file)
    hashes.add(model_hash(str(file)))
    assert len(hashes) == 4


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights.pop(name)


def drop_all(prefix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(prefix)]


def spoil(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights[name].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop_all("cond_stage_model."), "no weights of 'text_encoder' under the names of the original"),
        (drop_all("first_stage_model."), "no weights of 'vae'"),
        (drop(f"{UNET}middle_block.2.out_layers.3.weight"), r"have no '.*middle_block\.2\.out_layers\.3\.weight'"),
        (drop("first_stage_model.encoder.down.0.block.0.conv1.bias"), r"have no '.*down\.0\.block\.0\.conv1\.bias'"),
        (
            drop("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
            r"have no '.*layers\.1\.mlp\.fc1\.weight'",
        ),
        (spoil(f"{UNET}out.2.weight"), r"'.*out\.2\.weight' in 'unet' has values that are NaN"),
        (
            lambda weights: weights.update({FIRST: torch.zeros(32, 9, 3, 3)}),
            "has shape .32, 9, 3, 3., which is not what its config.json says",
        ),
    ],
)
def test_a_file_that_lacks_something_is_refused_before_it_loads(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], problem: str
) -> None:
    file = save_in_one_file(tiny_model, without_weights(tiny_model, tmp_path / "single") / "model.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=problem):
        check_model(str(file))


def test_weights_that_only_the_conversion_misses_are_named(tiny_model: Path, tmp_path: Path) -> None:
    file = save_in_one_file(tiny_model, without_weights(tiny_model, tmp_path / "single") / "model.safetensors")
    weights = load_file(file)
    del weights[f"{UNET}time_embed.2.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"are not those of a UNet2DConditionModel: 'time_embedding\.linear_2\.bias'"):
        load_backbone(str(file), device="cpu")


@pytest.mark.parametrize(
    ("names", "options", "folder"),
    [
        ([], {}, "sd1"),
        ([], {"width": 1024, "modelspec.prediction_type": "epsilon"}, "sd2"),
        ([], {"width": 1024, "modelspec.prediction_type": "v"}, "sd2-v"),
        ([], {"width": 1024, "modelspec.architecture": "stable-diffusion-v2-768-v"}, "sd2-v"),
        ([], {"width": 2048}, "sdxl"),
        (["v_pred"], {"width": 2048}, "sdxl-v"),
        (["v_pred", "ztsnr"], {"width": 2048}, "sdxl-v-zsnr"),
    ],
)
def test_standard_architectures_have_their_configurations_here(
    tmp_path: Path, names: list[str], options: dict[str, Any], folder: str
) -> None:
    file = a_file(tmp_path / "x.safetensors", *names, **options)
    assert configurations(file).name == folder
    files = find_model_files(str(file))
    assert files.checkpoint == file
    assert "unet/config.json" in files.names
    assert "tokenizer/merges.txt" in files.names
    scheduler = json.loads((files.directory / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"] == "v_prediction") == ("-v" in folder)
    vocabularies = load_vocabularies_of(files.directory, files.pipeline_class)
    for key, vocabulary in vocabularies.items():
        assert vocabulary.tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]
        start, end, padding = vocabulary.assemble([])[0], vocabulary.assemble([])[1], vocabulary.assemble([])[-1]
        assert (start, end) == (49406, 49407)
        assert padding == (0 if key == "clip_g" or "sd2" in folder else 49407)


@pytest.mark.parametrize(("width", "component"), [(768, "tokenizer"), (2048, "tokenizer"), (2048, "tokenizer_2")])
def test_the_vocabulary_that_follows_from_the_merges_is_clips(tmp_path: Path, width: int, component: str) -> None:
    directory = configurations(a_file(tmp_path / "x.safetensors", width=width))
    with complete_tokenizer(directory, component) as whole:
        content = (whole / component / "vocab.json").read_bytes()
    assert not whole.exists()
    assert hashlib.sha256(content).hexdigest() == "4845b0e575739dbabfda3b54f086884b37d73e94b067988d925a7e52bfdfb8e8"
    theirs = read_tokenizer(directory, component)
    assert isinstance(theirs, CLIPTokenizerFast)
    assert len(theirs) == 49408
    assert theirs("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert theirs.convert_tokens_to_ids(["!", "\u0143", "!</w>", "\u0143</w>", "in"]) == [0, 255, 256, 511, 512]


def test_prompts_with_special_tokens_written_out_are_read_with_the_architectures_here(tmp_path: Path) -> None:
    """Transformers reads them, from files."""
    directory = configurations(a_file(tmp_path / "x.safetensors"))
    vocabulary = load_vocabularies_of(directory, "StableDiffusionPipeline")["clip_l"]
    assert vocabulary.tokenize("a cat<|endoftext|>") == [320, 2368, 49407]


def test_a_vocabulary_that_follows_counts_in_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(a_file(tmp_path / "x.safetensors"))
    assert "tokenizer/vocab.json" in find_model_files(file).names
    before = model_hash(file)
    monkeypatch.setattr(model_files, "derive_vocabulary", lambda _path: b"{}")
    assert model_hash(file) != before


def load_vocabularies_of(directory: Path, pipeline_class: str) -> dict[str, Any]:
    from textual_inversion import text_encoders, tokenizer

    module = text_encoders if pipeline_class == "StableDiffusionXLPipeline" else tokenizer
    return module.load_vocabularies(directory)


@pytest.mark.parametrize(("text", "folder"), [('    parameterization: "v"\n', "sd2-v"), ("model:\n", "sd2")])
def test_the_original_codes_configuration_beside_the_file_says_what_it_predicts(
    tmp_path: Path, text: str, folder: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert configurations(a_file(tmp_path / "x.safetensors", width=1024)).name == folder


@pytest.mark.parametrize(
    ("names", "options", "problem"),
    [
        ([], {"width": 1024}, "published with epsilon and with v-prediction"),
        ([], {"width": 999}, "text states of width 999"),
        ([], {"channels": 9}, "takes 9 channels: an inpainting model"),
        ([], {"channels": 5}, "takes 5 channels: a depth model"),
        (["lora_unet_x.lora_up.weight"], {}, "it is a LoRA"),
        (["conditioner.embedders.0.model.ln_final.weight"], {"width": 1280}, "it is an SDXL refiner"),
        (["edm_vpred.sigma_max"], {"width": 2048}, "EDM schedule"),
    ],
)
def test_other_files_are_refused_for_what_they_are(
    tmp_path: Path, names: list[str], options: dict[str, Any], problem: str
) -> None:
    file = a_file(tmp_path / "x.safetensors", *names, **options)
    with pytest.raises(ValueError, match=problem) as error:
        find_model_files(str(file))
    assert "give a directory" in str(error.value)


@pytest.mark.parametrize("lies_in_a_directory", [False, True])
@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        (
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
            "it is a Stable Diffusion 3 checkpoint",
            "`diffusers.StableDiffusion3Pipeline.from_single_file('x.safetensors').save_pretrained(directory)`",
        ),
        (
            "double_blocks.0.img_attn.qkv.weight",
            "it is a FLUX.1 checkpoint",
            "`diffusers.FluxPipeline.from_single_file('x.safetensors').save_pretrained(directory)`",
        ),
        (
            "cond_stage_model.transformer.attn_layers.layers.0.1.to_q.weight",
            "it is latent diffusion with a BERT text encoder",
            "download_from_original_stable_diffusion_ckpt and `.save_pretrained(directory)`",
        ),
    ],
)
def test_families_that_need_a_directory_are_told_how_to_make_one(
    tmp_path: Path, name: str, problem: str, remedy: str, lies_in_a_directory: bool
) -> None:
    """Also if the file lies where configurations are, which would not help."""
    file = a_file(tmp_path / "x.safetensors", name, width=1280)
    if lies_in_a_directory:
        (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=problem) as error:
        find_model_files(str(file))
    assert remedy in str(error.value)


def test_a_path_of_a_file_is_never_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'models/x\.safetensors': there is no such file"):
        find_model_files("models/x.safetensors")
    pickled = tmp_path / "x.ckpt"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match="is pickled, which can run code when read; convert it once"):
        find_model_files(str(pickled))
