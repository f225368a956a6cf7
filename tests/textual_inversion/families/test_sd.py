"""Loading Stable Diffusion directories: what is accepted, what is refused, and what is frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny_models import DIM, LATENT_SHAPE, MAX_LENGTH, RESOLUTION
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.model_files import model_hash
from textual_inversion.noise import VPrediction
from textual_inversion.prompts import encode_prompt


@pytest.fixture
def a_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(directory: Path, **options: str) -> Backbone:
    return load_backbone(str(directory), device="cpu", **options)


def some_ids(backbone: Backbone, *rows: int) -> dict[str, torch.Tensor]:
    return stack_prompts([encode_prompt("a photo of a <c>", {"<c>": rows}, backbone.vocabularies)])


def test_shapes_come_from_the_checkpoint(tiny_backbone: Backbone, tiny_model: Path) -> None:
    assert tiny_backbone.resolution == RESOLUTION
    assert tiny_backbone.latent_shape == LATENT_SHAPE
    assert some_ids(tiny_backbone)["clip_l"].shape == (1, MAX_LENGTH)
    assert tiny_backbone.token_tables["clip_l"].dim == DIM
    assert tiny_backbone.noise.num_timesteps == 1000
    assert tiny_backbone.dtype == torch.float32
    assert tiny_backbone.model_hash() == model_hash(str(tiny_model))


def test_guidance_is_what_the_schedulers_config_says(a_copy: Path, tiny_backbone: Backbone) -> None:
    assert tiny_backbone.guidance_scale == 5
    edit(a_copy / "scheduler/scheduler_config.json", _guidance_scale=2.5)
    assert load(a_copy).guidance_scale == 2.5
    assert load(Path(__file__).parents[3] / "demo/model").guidance_scale == 2


def test_steps_are_what_the_schedulers_config_says(a_copy: Path, tiny_backbone: Backbone) -> None:
    assert tiny_backbone.sampling_steps == 20
    edit(a_copy / "scheduler/scheduler_config.json", timestep_spacing="trailing")  # as SD-Turbo is published
    distilled = load(a_copy)
    assert (distilled.guidance_scale, distilled.sampling_steps) == (1, 4)
    edit(a_copy / "scheduler/scheduler_config.json", _num_inference_steps=2)
    assert load(a_copy).sampling_steps == 2


def test_resolution_falls_back_to_the_autoencoders(a_copy: Path) -> None:
    edit(a_copy / "unet/config.json", sample_size=None)
    assert load(a_copy).resolution == RESOLUTION


def test_gradients_reach_the_rows_and_nothing_else(tiny_model: Path) -> None:
    backbone: Any = load(tiny_model)
    rows = torch.randn(3, DIM, requires_grad=True)
    conditioning = backbone.encode_prompts(some_ids(backbone, 1), {"clip_l": rows})
    backbone.predict(torch.randn(1, *LATENT_SHAPE), torch.tensor([500]), conditioning).pow(2).sum().backward()
    assert rows.grad is not None
    assert rows.grad[1].norm() > 0
    assert not rows.grad[[0, 2]].any()
    for module in (backbone._text_encoder, backbone._network, backbone._vae):
        assert not module.training
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_a_prompt_that_does_not_fit_is_refused_with_its_length(tiny_backbone: Backbone) -> None:
    vocabulary = tiny_backbone.vocabularies["clip_l"]
    assert len(vocabulary.assemble([1] * vocabulary.max_tokens)) == MAX_LENGTH == vocabulary.max_tokens + 2
    with pytest.raises(ValueError, match=f"{MAX_LENGTH - 1} tokens are 1 more than the {MAX_LENGTH - 2}"):
        vocabulary.assemble([1] * (MAX_LENGTH - 1))


def test_an_end_of_text_id_of_2_does_no_harm(a_copy: Path, tiny_backbone: Backbone) -> None:
    """Old configs: transformers then pools at the largest id, which is a learned row's. The states do not change."""
    edit(a_copy / "text_encoder/config.json", eos_token_id=2)
    ids, rows = some_ids(tiny_backbone, 0), {"clip_l": torch.ones(1, DIM)}
    assert torch.equal(
        load(a_copy).encode_prompts(ids, rows).hidden, tiny_backbone.encode_prompts(ids, rows).hidden
    )  # fmt: skip


def test_fp16_files_are_upcast_without_loss(tiny_model: Path, tmp_path: Path) -> None:
    half = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).to(dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    backbone: Any = load(tmp_path / "half")
    weights = load_file(tmp_path / "half/text_encoder/model.safetensors")
    table = next(w for name, w in weights.items() if name.endswith("token_embedding.weight"))
    assert table.dtype == torch.float16
    assert torch.equal(backbone.token_tables["clip_l"].weight, table.float())
    assert {backbone._network.dtype, backbone._vae.dtype, backbone._text_encoder.dtype} == {torch.float32}


def test_a_text_encoder_with_a_half_config_and_full_weights_keeps_its_digits(a_copy: Path) -> None:
    edit(a_copy / "text_encoder/config.json", dtype="float16", torch_dtype="float16")
    weights = load_file(a_copy / "text_encoder/model.safetensors")
    table = next(w for name, w in weights.items() if name.endswith("token_embedding.weight"))
    assert torch.equal(load(a_copy).token_tables["clip_l"].weight, table)


def test_fp16_variant_files_are_used_when_there_are_no_others(tiny_model: Path, tmp_path: Path) -> None:
    half = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).to(dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    assert load(tmp_path / "half").latent_shape == LATENT_SHAPE


@pytest.mark.parametrize(
    ("precision", "autoencoder"), [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)]
)
def test_precision_of_the_parts(tiny_model: Path, precision: str, autoencoder: torch.dtype) -> None:
    backbone: Any = load(tiny_model, precision=precision)
    assert backbone.dtype == getattr(torch, precision)
    assert backbone._vae.dtype == autoencoder
    assert backbone._text_encoder.dtype == torch.float32
    conditioning = backbone.encode_prompts(some_ids(backbone), {})
    assert conditioning.hidden.dtype == backbone.dtype
    latents = torch.randn(1, *LATENT_SHAPE)
    assert backbone.predict(latents, torch.tensor([5]), conditioning).dtype == torch.float32
    assert backbone.decode(latents).dtype == torch.float32
    assert backbone.encode_images(torch.zeros(1, 3, RESOLUTION, RESOLUTION)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_the_text_encoder_multiplies_in_bfloat16_beside_such_a_denoiser(
    tiny_model: Path, tiny_backbone: Backbone, precision: str, expected: torch.dtype
) -> None:
    """With the rows' gradient in float32 and, to bfloat16's rounding, what it is in float32."""
    backbone: Any = load(tiny_model, precision=precision)
    seen: set[torch.dtype] = set()
    for module in backbone._text_encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    gradients = []
    for each in backbone, tiny_backbone:
        row = torch.ones(1, DIM, requires_grad=True)
        hidden = each.encode_prompts(some_ids(each, 0), {"clip_l": row}).hidden
        gradients += torch.autograd.grad(hidden.float().square().mean(), row)
    half, full = gradients
    assert seen == {expected}
    assert half.dtype == torch.float32
    assert float(F.cosine_similarity(half, full)) > 0.99


def test_unknown_precision_and_solver_are_refused(tiny_model: Path, tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="precision 'int8'"):
        load(tiny_model, precision="int8")
    with pytest.raises(ValueError, match="solver 'euler'"):
        tiny_backbone.noise.begin("euler", 3)


def test_pickled_weights_are_refused_by_name(a_copy: Path) -> None:
    weights = a_copy / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), a_copy / "unet/diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"'unet' holds only pickled weights \(diffusion_pytorch_model.bin\).*convert"):
        load(a_copy)


def test_a_component_without_weights_is_refused(a_copy: Path) -> None:
    (a_copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'vae' has no .safetensors"):
        load(a_copy)


def test_another_pipeline_class_is_refused_by_name(a_copy: Path) -> None:
    edit(a_copy / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(ValueError, match="is a StableDiffusionInpaintPipeline; families known here"):
        load(a_copy)


def test_an_inpainting_denoiser_is_refused(a_copy: Path) -> None:
    edit(a_copy / "unet/config.json", in_channels=9)
    path = a_copy / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = torch.zeros(weights["conv_in.weight"].shape[0], 9, 3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="takes 9 channels but the autoencoder has 4"):
        load(a_copy)


def test_sampling_keeps_the_checkpoints_schedule(a_copy: Path) -> None:
    """Also from a checkpoint that names a stochastic solver, or leaves out what old ones left out."""
    config = json.loads((a_copy / "scheduler/scheduler_config.json").read_text())
    del config["clip_sample"], config["steps_offset"]
    config |= {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    (a_copy / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    noise = load(a_copy).noise
    assert isinstance(noise, VPrediction)
    plain = {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type",
                                             "timestep_spacing")}  # fmt: skip
    theirs = {
        "ddim": DDIMScheduler(**plain, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        "dpm++": DPMSolverMultistepScheduler(**plain, steps_offset=1),
    }
    latents, output = torch.randn(2, 1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    for solver, scheduler in theirs.items():
        scheduler.set_timesteps(4)
        for _ in range(2):  # the second run begins anew
            run, ours, expected = noise.begin(solver, 4), latents, latents
            scheduler.set_timesteps(4)
            assert torch.equal(run.timesteps, scheduler.timesteps)
            for step, timestep in enumerate(scheduler.timesteps):
                ours = run.step(output, step, ours)
                expected = scheduler.step(output, timestep, expected).prev_sample
            assert torch.equal(ours, expected)


def test_an_unknown_prediction_type_is_refused(a_copy: Path) -> None:
    edit(a_copy / "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        load(a_copy)


def test_words_are_one_token_each(tiny_backbone: Backbone) -> None:
    words = tiny_backbone.single_token_words()
    assert {"cat", "photo", "style"} <= set(words)
    assert words == sorted(set(words))
    assert all(word.islower() and len(tiny_backbone.vocabularies["clip_l"].tokenize(word)) == 1 for word in words)
