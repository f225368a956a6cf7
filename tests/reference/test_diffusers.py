"""Our numbers against diffusers' own modules and pipeline: the same files, the same noise, the same pictures.

All in float32 on one thread. The modules are called alike, so they agree to the bit; pictures agree to the 8-bit level
(a few pixels may fall on either side of a rounding).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from tests.tiny_models import DIM, MAX_LENGTH, tiny_stable_diffusion
from textual_inversion import adapter_formats
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import SamplingConfig, Solver
from textual_inversion.diffusers_pipeline import load_into_pipeline
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.formats import ADAPTER_FILE, dump_diffusers, parse_diffusers
from textual_inversion.generate import ImageRequest, generate, initial_noise
from textual_inversion.lora import TARGETS, initial_adapter, merged_state_dict
from textual_inversion.prompts import encode_prompt

WORD = "<cat-toy>"
PROMPTS = (f"a photo of a {WORD}", f"a {WORD} and a clock, on the {WORD} beach", f"Snow {WORD}!")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_stable_diffusion(tmp_path_factory.mktemp(request.param) / "model", prediction_type=request.param)


@pytest.fixture(scope="module")
def backbone(directory: Path) -> Backbone:
    return load_backbone(str(directory), device="cpu", precision="float32")


@pytest.fixture
def pipeline(directory: Path) -> Any:
    """A new one for each test: loading an embedding resizes its vocabulary for good."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def an_embedding(num_vectors: int, seed: int = 0, word: str = WORD) -> LearnedEmbedding:
    rows = torch.randn(num_vectors, DIM, generator=torch.Generator().manual_seed(seed)) * 0.3
    return LearnedEmbedding(placeholder_token=word, vectors={"clip_l": rows}, metadata={"step": "5"})


def load_into(pipeline: Any, embedding: LearnedEmbedding, folder: Path) -> None:
    (folder / "learned_embeds.safetensors").write_bytes(dump_diffusers(embedding))
    pipeline.load_textual_inversion(str(folder))


def with_adapter(
    embedding: LearnedEmbedding, backbone: Backbone, kind: Any = "lora", targets: Any = TARGETS, rank: int = 3
) -> LearnedEmbedding:
    """With an adapter whose scale is neither 1 nor its rank."""
    generator = torch.Generator().manual_seed(4 - rank)
    start = initial_adapter(backbone.adapter_layers, targets, rank, generator)
    tensors = {name: (down, 0.3 * torch.randn(up.shape, generator=generator)) for name, (down, up) in start.items()}
    return replace(embedding, adapter=LearnedAdapter(kind=kind, scale=0.7, tensors=tensors))


def with_solver(pipeline: Any, solver: Solver) -> Any:
    cls = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[solver]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    return pipeline


def drawn_by_diffusers(pipeline: Any, backbone: Backbone, request: ImageRequest, config: SamplingConfig) -> Image.Image:
    width, height = request.size_px or (backbone.resolution,) * 2
    noise = initial_noise(backbone, request.seed, backbone.latent_shape_for(width, height))[None]
    return pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        latents=noise,
        width=width,
        height=height,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
    ).images[0]


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    a, b = np.asarray(ours).astype(int), np.asarray(theirs).astype(int)
    assert a.shape == b.shape
    assert a.std() > 5, "a flat picture would prove nothing"
    assert abs(a - b).max() <= 1
    assert (a != b).mean() < 0.005


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_a_file_we_write_draws_the_same_picture_in_diffusers(
    backbone: Backbone, pipeline: Any, tmp_path: Path, solver: Solver, num_vectors: int
) -> None:
    embedding = an_embedding(num_vectors)
    load_into(pipeline, embedding, tmp_path)
    with_solver(pipeline, solver)
    config = SamplingConfig(solver=solver, steps=4, guidance_scale=5.0, batch_size=1)
    for seed, prompt in enumerate(PROMPTS[:2]):
        request = ImageRequest(prompt, seed, (embedding,))
        (ours,) = generate(backbone, [request], config)
        assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))


@pytest.mark.parametrize("has_adapters", [False, True])
def test_a_concept_in_the_negative_prompt_does_what_it_does_in_diffusers(
    backbone: Backbone, pipeline: Any, tmp_path: Path, has_adapters: bool
) -> None:
    """A LoRA that the pipeline has loaded acts on both prompts."""
    embedding, away = an_embedding(2), an_embedding(3, seed=1, word="<bad-hands>")
    if has_adapters:
        embedding = with_adapter(embedding, backbone)
        (tmp_path / "adapter.safetensors").write_bytes(dump_adapter(embedding))
        pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
        (tmp_path / "adapter.safetensors").unlink()
    for each in (embedding, away):
        load_into(pipeline, each, tmp_path)
    with_solver(pipeline, "ddim")
    config = SamplingConfig(solver="ddim", steps=4, guidance_scale=5.0, batch_size=1)
    request = ImageRequest(PROMPTS[0], 3, (embedding,), f"<bad-hands>, dark {WORD}", (away, embedding))
    (ours,) = generate(backbone, [request], config)
    assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))
    (plain,) = generate(backbone, [replace(request, negative_prompt="", negative_embeddings=())], config)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(plain).astype(int)).max() > 1


def test_a_picture_of_another_size_is_that_of_diffusers(backbone: Backbone, pipeline: Any, tmp_path: Path) -> None:
    embedding = an_embedding(1)
    load_into(pipeline, embedding, tmp_path)
    with_solver(pipeline, "ddim")
    config = SamplingConfig(solver="ddim", steps=4, guidance_scale=5.0, batch_size=1)
    request = ImageRequest(PROMPTS[0], 3, (embedding,), size_px=(2 * backbone.resolution, backbone.resolution))
    (ours,) = generate(backbone, [request], config)
    assert ours.size == request.size_px
    assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))


def test_without_guidance_too(backbone: Backbone, pipeline: Any, tmp_path: Path) -> None:
    embedding = an_embedding(2)
    load_into(pipeline, embedding, tmp_path)
    with_solver(pipeline, "ddim")
    config = SamplingConfig(solver="ddim", steps=4, guidance_scale=1.0, batch_size=1)
    request = ImageRequest(PROMPTS[0], 3, (embedding,))
    (ours,) = generate(backbone, [request], config)
    assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))


def test_a_mixed_batch_draws_what_diffusers_draws_one_by_one(
    backbone: Backbone, directory: Path, tmp_path: Path
) -> None:
    """Two embeddings under one word, and no embedding at all, in the same forward pass."""
    config = SamplingConfig(solver="dpm++", steps=4, guidance_scale=4.0, batch_size=4)
    requests = [
        ImageRequest(f"a photo of a {WORD}", 1, (an_embedding(1, seed=1),)),
        ImageRequest(f"a photo of a {WORD}", 1, (an_embedding(2, seed=2),)),
        ImageRequest("a photo of a cat", 1),
    ]
    pictures = generate(backbone, requests, config)
    for i, (request, ours) in enumerate(zip(requests, pictures, strict=True)):
        pipeline = with_solver(StableDiffusionPipeline.from_pretrained(directory, safety_checker=None), config.solver)
        for embedding in request.embeddings:
            (tmp_path / str(i)).mkdir()
            load_into(pipeline, embedding, tmp_path / str(i))
        assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_an_adapter_we_write_draws_the_same_picture_in_diffusers(
    backbone: Backbone, pipeline: Any, tmp_path: Path, guidance_scale: float
) -> None:
    """Loaded by PEFT, and merged into the weights."""
    embedding = with_adapter(an_embedding(2), backbone)
    assert embedding.adapter is not None
    config = SamplingConfig(solver="ddim", steps=4, guidance_scale=guidance_scale, batch_size=1)
    request = ImageRequest(PROMPTS[0], 0, (embedding,))
    (ours,) = generate(backbone, [request], config)
    (without,) = generate(backbone, [replace(request, embeddings=(replace(embedding, adapter=None),))], config)
    assert (np.asarray(ours) != np.asarray(without)).mean() > 0.5

    with_solver(pipeline, "ddim")
    load_into(pipeline, embedding, tmp_path)
    pipeline.text_encoder.load_state_dict(merged_state_dict(pipeline.text_encoder.state_dict(), embedding.adapter))
    assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))
    pipeline.text_encoder.load_state_dict(
        merged_state_dict(pipeline.text_encoder.state_dict(), replace(embedding.adapter, scale=-0.7))
    )

    (tmp_path / "adapter.safetensors").write_bytes(dump_adapter(embedding))
    pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    assert_same_picture(ours, drawn_by_diffusers(pipeline, backbone, request, config))


@pytest.mark.parametrize("targets", [TARGETS, ("fc2", "cross_attention"), ("cross_attention",)])
def test_a_causal_adapter_is_refused_by_a_plain_loader(
    backbone: Backbone, pipeline: Any, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """It would change the whole prompt, in silence."""
    embedding = with_adapter(an_embedding(1), backbone, "causal", targets)
    (tmp_path / "adapter.safetensors").write_bytes(dump_adapter(embedding))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")


@pytest.mark.parametrize("targets", [("fc2",), ("fc2", "cross_attention"), ("cross_attention",)])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_causal_adapters_loaded_into_a_pipeline_draw_our_pictures(
    backbone: Backbone, pipeline: Any, targets: tuple[str, ...], guidance_scale: float
) -> None:
    """TextBoost v2 and ++: one concept, two in one prompt, several pictures of a prompt, and none."""
    first = with_adapter(an_embedding(2), backbone, "causal", targets)
    second = with_adapter(an_embedding(1, 5, "<dog>"), backbone, "causal", targets, rank=1)
    written = dump_diffusers(first), dump_adapter(first)
    read = adapter_formats.with_adapter(parse_diffusers(written[0]), {ADAPTER_FILE: written[1]}.__getitem__)
    config = SamplingConfig(solver="ddim", steps=4, guidance_scale=guidance_scale, batch_size=4)
    requests = [
        ImageRequest(PROMPTS[0], 0, (first,)),
        ImageRequest(f"a <dog> and a {WORD} on the beach", 1, (first, second)),
        ImageRequest("a photo of a cat", 2),
        ImageRequest(PROMPTS[0], 3, (first,)),
    ]
    ours = generate(backbone, requests, config)
    plain = generate(backbone, [replace(requests[0], embeddings=(replace(first, adapter=None),))], config)
    assert (np.asarray(ours[0]) != np.asarray(plain[0])).mean() > 0.5

    with_solver(pipeline, "ddim")
    load_into_pipeline(pipeline, [read, second])
    for request, picture in zip(requests, ours, strict=True):
        assert_same_picture(picture, drawn_by_diffusers(pipeline, backbone, request, config))
    noises = torch.stack([initial_noise(backbone, seed) for seed in (0, 3)])
    two = pipeline(
        PROMPTS[0], num_images_per_prompt=2, latents=noises, num_inference_steps=4, guidance_scale=guidance_scale
    ).images
    for picture, theirs in zip((ours[0], ours[3]), two, strict=True):
        assert_same_picture(picture, theirs)
    with pytest.raises(ValueError, match="clip_skip"):
        pipeline(PROMPTS[0], clip_skip=1)
    with pytest.raises(ValueError, match="load all of them in one call"):
        load_into_pipeline(pipeline, [second])


def test_what_a_pipeline_cannot_take_is_refused(backbone: Backbone, pipeline: Any) -> None:
    with pytest.raises(ValueError, match="of kind 'lora'; load its embedding by load_textual_inversion"):
        load_into_pipeline(pipeline, [with_adapter(an_embedding(1), backbone)])
    foreign = LearnedAdapter(kind="causal", scale=1.0, tensors={"unet.x.cross_attention": (torch.ones(1, 9),) * 2})
    with pytest.raises(ValueError, match=r"'unet.x.cross_attention' with 9 inputs, which the pipeline does not have"):
        load_into_pipeline(pipeline, [replace(an_embedding(1), adapter=foreign)])


@pytest.mark.parametrize("num_vectors", [1, 2, 4])
def test_prompt_encoding_equals_encode_prompt(
    backbone: Backbone, pipeline: Any, tmp_path: Path, num_vectors: int
) -> None:
    embedding = an_embedding(num_vectors)
    load_into(pipeline, embedding, tmp_path)
    for prompt in PROMPTS:
        ids = encode_prompt(prompt, {WORD: range(num_vectors)}, backbone.vocabularies)
        ours = backbone.encode_prompts(stack_prompts([ids]), embedding.vectors)
        theirs, empty = pipeline.encode_prompt(prompt, "cpu", 1, True)
        torch.testing.assert_close(ours.hidden, theirs, rtol=0, atol=1e-6)
        nothing = backbone.encode_prompts(stack_prompts([encode_prompt("", {}, backbone.vocabularies)]), {})
        torch.testing.assert_close(nothing.hidden, empty, rtol=0, atol=1e-6)


def test_plain_text_tokenises_as_the_checkpoints_tokenizer_does(backbone: Backbone, pipeline: Any) -> None:
    for text in ("", "a photo of a cat", "Weird  CAT, (a)!", "été à 東", "it's 3 cats"):
        theirs = pipeline.tokenizer(text, padding="max_length", max_length=MAX_LENGTH).input_ids
        assert encode_prompt(text, {}, backbone.vocabularies) == {"clip_l": theirs}


def test_encode_predict_and_decode_equal_diffusers_modules(backbone: Backbone, pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, backbone.resolution, backbone.resolution, generator=generator) * 2 - 1
    scaling = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        moments = backbone.encode_images(pixels)
        torch.testing.assert_close(moments[:, 0], posterior.mean * scaling, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments[:, 1], posterior.std * scaling, rtol=1e-6, atol=1e-7)

        latents = torch.randn(2, *backbone.latent_shape, generator=generator)
        hidden = torch.randn(2, MAX_LENGTH, DIM, generator=generator)
        timesteps = torch.tensor([3, 977])
        theirs = pipeline.unet(latents, timesteps, encoder_hidden_states=hidden).sample
        assert torch.equal(backbone.predict(latents, timesteps, Conditioning(hidden=hidden)), theirs)

        decoded = pipeline.vae.decode(latents / scaling).sample.clamp(-1, 1)
        # to rounding: the two copies of the weights lie at other addresses, by which some kernels choose their loops
        torch.testing.assert_close(backbone.decode(latents), decoded, rtol=0, atol=4e-6)


def test_the_noise_schedule_is_the_checkpoints_own(backbone: Backbone, pipeline: Any) -> None:
    latents, noise = torch.randn(2, 1000, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    t = torch.arange(1000)
    x_t, target = backbone.noise.corrupt(latents, noise, t)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(x_t, scheduler.add_noise(latents, noise, t))
    is_epsilon = scheduler.config.prediction_type == "epsilon"
    assert torch.equal(target, noise if is_epsilon else scheduler.get_velocity(latents, noise, t))
